//! A list of a few things, nearly always of one: that one lies in the list itself, and nothing is allocated for it.

use std::fmt;
use std::ops::Deref;

/// A list that reads as a slice. Memory is allocated from the second thing on.
#[derive(Clone)]
pub struct Handful<T>(List<T>);

#[derive(Clone)]
enum List<T> {
    One([T; 1]),
    /// None, or several.
    Other(Vec<T>),
}

impl<T> Handful<T> {
    /// A list of nothing.
    #[must_use]
    pub const fn new() -> Self {
        Self(List::Other(Vec::new()))
    }

    /// A list of one thing.
    #[must_use]
    pub const fn one(thing: T) -> Self {
        Self(List::One([thing]))
    }

    /// Puts a thing at the end.
    pub fn push(&mut self, thing: T) {
        self.0 = match std::mem::replace(&mut self.0, List::Other(Vec::new())) {
            List::Other(none) if none.is_empty() => List::One([thing]),
            List::Other(mut all) => {
                all.push(thing);
                List::Other(all)
            }
            List::One([first]) => List::Other(vec![first, thing]),
        };
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
        match &self.0 {
            List::One(one) => one,
            List::Other(all) => all,
        }
    }
}

impl<T> FromIterator<T> for Handful<T> {
    #[inline]
    fn from_iter<I: IntoIterator<Item = T>>(things: I) -> Self {
        let mut things = things.into_iter();
        let Some(first) = things.next() else { return Self::new() };
        let Some(second) = things.next() else { return Self::one(first) };
        Self(List::Other([first, second].into_iter().chain(things).collect()))
    }
}

impl<'a, T> IntoIterator for &'a Handful<T> {
    type Item = &'a T;
    type IntoIter = std::slice::Iter<'a, T>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl<T: PartialEq> PartialEq for Handful<T> {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl<T: Eq> Eq for Handful<T> {}

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
