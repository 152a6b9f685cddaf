//! A list of a few things, nearly always of one: that one lies in the list itself, and nothing is allocated for it.

use std::fmt;
use std::ops::Deref;

use smallvec::SmallVec;

/// A list that reads as a slice. Memory is allocated from the second thing on.
#[derive(Clone, PartialEq, Eq)]
pub struct Handful<T>(SmallVec<[T; 1]>);

impl<T> Handful<T> {
    /// A list of nothing.
    #[must_use]
    pub fn new() -> Self {
        Self(SmallVec::new())
    }

    /// A list of one thing.
    #[must_use]
    pub fn one(thing: T) -> Self {
        Self(SmallVec::from_buf([thing]))
    }

    /// Puts a thing at the end.
    pub fn push(&mut self, thing: T) {
        self.0.push(thing);
    }
}

impl<T> Default for Handful<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> Deref for Handful<T> {
    type Target = [T];

    #[inline]
    fn deref(&self) -> &[T] {
        &self.0
    }
}

impl<T> FromIterator<T> for Handful<T> {
    #[inline]
    fn from_iter<I: IntoIterator<Item = T>>(things: I) -> Self {
        Self(things.into_iter().collect())
    }
}

impl<'a, T> IntoIterator for &'a Handful<T> {
    type Item = &'a T;
    type IntoIter = std::slice::Iter<'a, T>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl<T: fmt::Debug> fmt::Debug for Handful<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_list_that_a_vector_would_be() {
        let mut pushed = Handful::new();
        for count in 0..5 {
            let expected: Vec<String> = (0..count).map(|thing| thing.to_string()).collect();
            let collected: Handful<String> = expected.iter().cloned().collect();
            assert_eq!((&*pushed, &*collected), (&*expected, &*expected));
            assert_eq!(pushed, collected);
            assert_eq!(pushed.clone().iter().count(), count);
            pushed.push(count.to_string());
        }
    }
}
