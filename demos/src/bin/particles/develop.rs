//! From sums of light to pictures: what film does.

use std::fs::File;
use std::io::BufWriter;
use std::path::Path;

use anyhow::{Context, Result};
use pinfold_demos::picture::Picture;
use rayon::prelude::*;

/// The picture of `light`, RGBA of half floats in rows of `width`.
pub(crate) fn develop(light: &[u16], width: u32, height: u32) -> Picture {
    let rgba = light
        .par_chunks_exact(4)
        .flat_map_iter(|pixel| {
            // The ground is a very dark blue.
            let ground = [0.004, 0.005, 0.011];
            let channel = |n: usize| display(1.0 - (-(single(pixel[n]) + ground[n])).exp());
            [channel(0), channel(1), channel(2), 255]
        })
        .collect();
    Picture { width, height, rgba }
}

/// A half float that is not negative, not infinite and a number.
fn single(half: u16) -> f32 {
    // The exponent moved to its place and its bias put right; so denormals come out, too.
    f32::from_bits(u32::from(half & 0x7fff) << 13) * f32::from_bits(0x7780_0000)
}

/// Eight bits of sRGB for linear light.
#[expect(clippy::cast_sign_loss, reason = "it is between 0 and 255")]
fn display(light: f32) -> u8 {
    let light = light.clamp(0.0, 1.0);
    let coded = if light <= 0.003_130_8 { light * 12.92 } else { 1.055 * light.powf(1.0 / 2.4) - 0.055 };
    (coded * 255.0).round() as u8
}

/// Half as wide and half as high; each pixel is the mean of four.
pub(crate) fn halved(picture: &Picture) -> Picture {
    let (width, height) = (picture.width / 2, picture.height / 2);
    let mut rgba = Vec::with_capacity(width as usize * height as usize * 4);
    for y in 0..height {
        for x in 0..width {
            let four = [(0, 0), (1, 0), (0, 1), (1, 1)].map(|(dx, dy)| picture.pixel(2 * x + dx, 2 * y + dy));
            rgba.extend((0..4).map(|n| (four.iter().map(|pixel| u16::from(pixel[n])).sum::<u16>() / 4) as u8));
        }
    }
    Picture { width, height, rgba }
}

/// Writes an animated PNG that starts over for ever.
pub(crate) fn write_animation(path: &Path, pictures: &[Picture]) -> Result<()> {
    let first = pictures.first().context("an animation has pictures")?;
    let file = BufWriter::new(File::create(path).with_context(|| path.display().to_string())?);
    let mut encoder = png::Encoder::new(file, first.width, first.height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.set_source_srgb(png::SrgbRenderingIntent::Perceptual);
    encoder.set_animated(u32::try_from(pictures.len())?, 0)?;
    encoder.set_frame_delay(1, 24)?;
    let mut writer = encoder.write_header()?;
    for picture in pictures {
        let rgb: Vec<u8> = picture.rgba.chunks_exact(4).flat_map(|pixel| [pixel[0], pixel[1], pixel[2]]).collect();
        writer.write_image_data(&rgb)?;
    }
    writer.finish()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_floats_are_read_exactly() {
        for (half, number) in [(0, 0.0), (0x3c00, 1.0), (0x3555, 0.333_251_95), (0x7bff, 65504.0), (1, 5.960_464_5e-8)]
        {
            assert!((single(half) - number).abs() <= number * 1e-6, "{half:#x}");
        }
    }
}
