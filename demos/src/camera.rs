//! A camera that sees all of a scene, from the front, the right and above.

use glam::{DMat4, DVec3};

use crate::scene::Scene;

/// Tangent of half the vertical angle of view: 30 degrees, as a long lens, which bends shapes little.
const TAN_HALF: f64 = 0.268;
/// Part of the picture's half width or height that the scene may reach.
const FILL: f64 = 0.92;

/// Where the camera stands and how it projects, for the shader.
#[derive(Debug, Clone, Copy)]
pub struct Camera {
    /// From the world to view space: the camera at the origin looking along -Z. The unit is the scene's half diagonal.
    pub view: DMat4,
    /// `clip = (x * p.x, y * p.y, z * p.z + p.w, -z)`; Vulkan's Y axis points down.
    pub projection: [f64; 4],
}

impl Camera {
    /// Frames the boxes of all draws for a picture of `width` by `height` pixels.
    #[must_use]
    pub fn framing(scene: &Scene, width: u32, height: u32) -> Self {
        let corners = || scene.draws.iter().flat_map(|draw| draw.corners());
        let low = corners().fold(DVec3::INFINITY, DVec3::min);
        let high = corners().fold(DVec3::NEG_INFINITY, DVec3::max);
        let half = (high - low).length() / 2.0;
        let unit = if half.is_finite() && half > 0.0 { half } else { 1.0 };

        // glTF's front is +Z and its up is +Y.
        let back = DVec3::new(0.62, 0.5, 0.85).normalize();
        let right = DVec3::Y.cross(back).normalize();
        let up = back.cross(right);
        let turn = DMat4::from_cols(right.extend(0.0), up.extend(0.0), back.extend(0.0), glam::DVec4::W).transpose();
        let seen =
            turn * DMat4::from_scale(DVec3::splat(1.0 / unit)) * DMat4::from_translation(-(low + (high - low) / 2.0));

        let aspect = f64::from(width) / f64::from(height);
        let (tan_x, tan_y) = (TAN_HALF * aspect * FILL, TAN_HALF * FILL);
        // A corner (x, y, z) is in the picture from a distance d on if |x| <= (d - z) * tan, and the same for y. Sliding the
        // camera sideways by (cx, cy) first centres what is seen: the sum of both sides' demands is what the distance must meet.
        let extreme = |f: &dyn Fn(DVec3) -> f64| {
            corners().map(|corner| f(seen.transform_point3(corner))).fold(f64::NEG_INFINITY, f64::max)
        };
        let (east, west) = (extreme(&|p| p.x + p.z * tan_x), extreme(&|p| -p.x + p.z * tan_x));
        let (north, south) = (extreme(&|p| p.y + p.z * tan_y), extreme(&|p| -p.y + p.z * tan_y));
        let (near_z, far_z) = (extreme(&|p| p.z), -extreme(&|p| -p.z));
        let slide = DVec3::new((east - west) / 2.0, (north - south) / 2.0, 0.0);
        let needed = ((east + west) / 2.0 / tan_x).max((north + south) / 2.0 / tan_y);
        let distance = needed.max(near_z + 0.05);

        let near = ((distance - near_z) * 0.9).max(1e-3);
        let far = (distance - far_z) * 1.1;
        let view = DMat4::from_translation(DVec3::new(-slide.x, -slide.y, -distance)) * seen;
        // Depth 0 at `near`, 1 at `far`.
        let (z, w) = (-far / (far - near), -far * near / (far - near));
        Self { view, projection: [1.0 / (TAN_HALF * aspect), -1.0 / TAN_HALF, z, w] }
    }
}
