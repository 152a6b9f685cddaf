//! The first words between a program and a reader. Both come from outside, so every field is checked before it is used.

use thiserror::Error;

use super::super::queue::MAX_CAPACITY;

/// The version both sides must speak.
pub const VERSION: u32 = 1;
/// Bytes of a [`Greeting`].
pub const GREETING_LEN: usize = 16;
/// Bytes of a [`Welcome`].
pub const WELCOME_LEN: usize = 48;

const MAGIC: [u8; 8] = *b"PFWATCH\0";
const VERSION_AT: usize = 8;

/// Why some bytes are no greeting, or no welcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum HelloError {
    /// They don't begin with the magic bytes, or there are too few.
    #[error("the other side doesn't speak this protocol")]
    Foreign,
    /// The other side speaks another version.
    #[error("the other side speaks version {theirs} of the protocol, this one version {VERSION}")]
    Version {
        /// What it speaks.
        theirs: u32,
    },
    /// A field has a value it can't have.
    #[error("the other side's {what} is {value}")]
    Field {
        /// Which field.
        what: &'static str,
        /// What it says.
        value: u64,
    },
}

/// What the reader says first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Greeting {}

impl Greeting {
    /// Its bytes.
    #[must_use]
    pub fn to_bytes(self) -> [u8; GREETING_LEN] {
        let mut bytes = [0; GREETING_LEN];
        put_head(&mut bytes);
        bytes
    }

    /// Checks a greeting.
    ///
    /// # Errors
    /// [`HelloError`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, HelloError> {
        check_head(bytes, GREETING_LEN)?;
        match u32_at(bytes, 12) {
            0 => Ok(Self {}),
            value => Err(HelloError::Field { what: "reserved word", value: value.into() }),
        }
    }
}

/// What the program answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Welcome {
    /// Two descriptors come with this.
    Yes {
        /// The program.
        process: u32,
        /// Slots in the records' file.
        slots: u64,
        /// How many of them hold ordinary records.
        limit: u64,
    },
    /// The errno of the refusal: `EPERM`, `EBUSY`, `EPROTO`, ...
    No(i32),
}

impl Welcome {
    /// Its bytes.
    #[must_use]
    pub fn to_bytes(self) -> [u8; WELCOME_LEN] {
        let mut bytes = [0; WELCOME_LEN];
        put_head(&mut bytes);
        match self {
            Self::No(errno) => bytes[12..16].copy_from_slice(&errno.to_ne_bytes()),
            Self::Yes { process, slots, limit } => {
                bytes[16..20].copy_from_slice(&process.to_ne_bytes());
                bytes[24..32].copy_from_slice(&slots.to_ne_bytes());
                bytes[32..40].copy_from_slice(&limit.to_ne_bytes());
            }
        }
        bytes
    }

    /// Checks a welcome.
    ///
    /// # Errors
    /// [`HelloError`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, HelloError> {
        check_head(bytes, WELCOME_LEN)?;
        let refusal = u32_at(bytes, 12).cast_signed();
        if refusal != 0 {
            return Ok(Self::No(refusal));
        }
        let u64_at = |at: usize| u64::from_ne_bytes(*bytes[at..].first_chunk().expect("the length is checked"));
        let (process, slots, limit) = (u32_at(bytes, 16), u64_at(24), u64_at(32));
        if !slots.is_power_of_two() || slots > 2 * MAX_CAPACITY as u64 {
            return Err(HelloError::Field { what: "count of slots", value: slots });
        }
        if limit == 0 || limit > slots {
            return Err(HelloError::Field { what: "count of used slots", value: limit });
        }
        Ok(Self::Yes { process, slots, limit })
    }
}

fn put_head(bytes: &mut [u8]) {
    bytes[..VERSION_AT].copy_from_slice(&MAGIC);
    bytes[VERSION_AT..VERSION_AT + 4].copy_from_slice(&VERSION.to_ne_bytes());
}

/// Checks magic and version; the version first of what follows the magic, as another version may have another length.
fn check_head(bytes: &[u8], len: usize) -> Result<(), HelloError> {
    if bytes.len() < VERSION_AT + 4 || bytes[..VERSION_AT] != MAGIC {
        return Err(HelloError::Foreign);
    }
    let theirs = u32_at(bytes, VERSION_AT);
    if theirs != VERSION {
        return Err(HelloError::Version { theirs });
    }
    if bytes.len() == len { Ok(()) } else { Err(HelloError::Foreign) }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(*bytes[at..].first_chunk().expect("the length is checked"))
}
