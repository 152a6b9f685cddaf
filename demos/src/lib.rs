//! What the demos share: a binary glTF file opened without touching its vertices, the scene in it, and a small renderer that binds
//! vertices and indices wherever they lie.

#[cfg(not(target_pointer_width = "64"))]
compile_error!("pinfold needs 64-bit addresses");

pub mod camera;
pub mod device;
pub mod geometry;
pub mod glb;
pub mod picture;
mod pipeline;
pub mod render;
pub mod resource;
pub mod scene;
