//! Sets of shards: which gates a target's uses pass, and which a mutation closes.

/// How many shards there are. The last one is for ranges without hold-off.
pub const SHARDS: usize = 16;

/// A set of shards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct Shards(pub u16);

impl Shards {
    /// No shard.
    pub const NONE: Self = Self(0);
    /// Every shard.
    pub const ALL: Self = Self(u16::MAX);

    /// The set of one shard.
    #[must_use]
    pub fn one(shard: usize) -> Self {
        debug_assert!(shard < SHARDS, "shards are numbered below SHARDS");
        Self(1 << shard)
    }

    /// Both sets.
    #[must_use]
    pub fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether every shard of `other` is in this set too.
    #[must_use]
    pub fn covers(self, other: Self) -> bool {
        other.0 & !self.0 == 0
    }

    /// Whether no shard is in the set.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether `shard` is in the set.
    #[must_use]
    pub fn has(self, shard: usize) -> bool {
        self.0 & (1 << shard) != 0
    }

    /// The shards of the set in ascending order, which is the order in which gates are entered.
    #[inline]
    pub fn iter(self) -> impl Iterator<Item = usize> + Clone {
        // From bit to bit: nearly every set has one, and each submit goes through its set several times.
        let mut left = self.0;
        std::iter::from_fn(move || {
            let first = (left != 0).then(|| left.trailing_zeros() as usize)?;
            left &= left - 1;
            Some(first)
        })
    }
}
