//! How a test says that it, or a part of it, did not run.
//!
//! libtest knows no verdict between passed and failed. A line of a fixed form on standard output stands in; `scripts/test` takes such
//! tests out of the number of those that passed, and lists the reasons.

/// Prints why the calling test does not run, and returns from it. For use in a function or closure that returns `()`.
#[macro_export]
macro_rules! skip {
    ($($why:tt)+) => {{
        println!("SKIP {}: {}", $crate::test_name!(), format_args!($($why)+));
        return;
    }};
}

/// Prints that one case of the calling test does not run, and why. The test goes on with its other cases.
#[macro_export]
macro_rules! skip_part {
    ($($why:tt)+) => {
        println!("SKIPPED PART OF {}: {}", $crate::test_name!(), format_args!($($why)+))
    };
}

/// The path of the calling test inside its test program, as libtest prints it.
#[macro_export]
macro_rules! test_name {
    () => {{
        // Without the crate's name in front and the closures behind, the path of a function written here is that of the test.
        fn here() {}
        $crate::process::test_of(std::any::type_name_of_val(&here))
    }};
}
