//! Whatever the other side of the socket says first: it is refused, or says the same when it is said again.
//! `scripts/fuzz 60 hello`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pinfold_core::watch::share::{Greeting, Welcome};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(greeting) = Greeting::from_bytes(bytes) {
        assert_eq!(greeting.to_bytes(), bytes);
    }
    if let Ok(welcome) = Welcome::from_bytes(bytes) {
        assert_eq!(Welcome::from_bytes(&welcome.to_bytes()), Ok(welcome));
        if let Welcome::Yes { slots, limit, .. } = welcome {
            assert!(slots.is_power_of_two() && (1..=slots).contains(&limit));
        }
    }
});
