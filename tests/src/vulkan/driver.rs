//! Which driver is tested, and the loader's way to it.

use std::env;
use std::fs;
use std::sync::OnceLock;

use ash::vk;

/// A driver that needs no GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Driver {
    /// Mesa's, of the distribution.
    Lavapipe,
    /// Mesa's, version 25 or newer.
    Lavapipe25,
    /// The browser's.
    SwiftShader,
}

impl Driver {
    /// The driver that `PINFOLD_TEST_DRIVER` names, with the loader told to use no other.
    ///
    /// # Errors
    /// Why there is none, as a sentence for [`skip!`](crate::skip).
    pub(super) fn chosen() -> Result<Self, String> {
        static CHOSEN: OnceLock<Result<Driver, String>> = OnceLock::new();
        CHOSEN.get_or_init(Self::choose).clone()
    }

    fn choose() -> Result<Self, String> {
        let name = env::var("PINFOLD_TEST_DRIVER").unwrap_or_else(|_| "lavapipe".into());
        let (driver, variable) = match name.as_str() {
            "lavapipe" => (Self::Lavapipe, "PINFOLD_LAVAPIPE_ICD"),
            "lavapipe25" => (Self::Lavapipe25, "PINFOLD_LAVAPIPE25_ICD"),
            "swiftshader" => (Self::SwiftShader, "PINFOLD_SWIFTSHADER_ICD"),
            _ => panic!("PINFOLD_TEST_DRIVER is `{name}`; it is `lavapipe`, `lavapipe25` or `swiftshader`"),
        };
        if env::var_os("VK_DRIVER_FILES").is_none() {
            let manifest = manifest(variable).ok_or("no Vulkan driver is chosen; scripts/setup finds them")?;
            for variable in ["VK_DRIVER_FILES", "VK_ICD_FILENAMES"] {
                // SAFETY: Rust's own readers of the environment take a lock; of the others, only the Vulkan loader reads these, and it is entered
                // only by those who have come through here.
                unsafe { env::set_var(variable, &manifest) };
            }
        }
        Ok(driver)
    }

    /// What the driver calls itself.
    pub(super) fn id(self) -> vk::DriverId {
        match self {
            Self::Lavapipe | Self::Lavapipe25 => vk::DriverId::MESA_LLVMPIPE,
            Self::SwiftShader => vk::DriverId::GOOGLE_SWIFTSHADER,
        }
    }
}

/// The driver's manifest, from the environment or from what scripts/setup has written down.
fn manifest(variable: &str) -> Option<String> {
    if let Ok(path) = env::var(variable) {
        return Some(path);
    }
    let found = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../.cache/env")).ok()?;
    let key = format!("export {variable}=");
    found.lines().find_map(|line| line.strip_prefix(&key)).map(str::to_owned)
}
