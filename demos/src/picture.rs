//! A picture in host memory, and its PNG.

use std::io::{self, Write};

/// Rows of RGBA pixels, 8 bits each, sRGB, the top row first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    /// Pixels in a row.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// `width * height * 4` bytes.
    pub rgba: Vec<u8>,
}

impl Picture {
    /// Writes it as a PNG file without alpha. Equal pictures make equal files.
    ///
    /// # Errors
    /// What `to` answers.
    pub fn write_png(&self, to: impl Write) -> io::Result<()> {
        let mut encoder = png::Encoder::new(to, self.width, self.height);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        encoder.set_source_srgb(png::SrgbRenderingIntent::Perceptual);
        encoder.set_compression(png::Compression::High);
        let rgb: Vec<u8> = self.rgba.chunks_exact(4).flat_map(|pixel| [pixel[0], pixel[1], pixel[2]]).collect();
        let mut writer = encoder.write_header()?;
        writer.write_image_data(&rgb)?;
        writer.finish()?;
        Ok(())
    }

    /// The pixel at (`x`, `y`).
    #[must_use]
    pub fn pixel(&self, x: u32, y: u32) -> [u8; 4] {
        let at = (y as usize * self.width as usize + x as usize) * 4;
        self.rgba[at..at + 4].try_into().expect("four bytes")
    }

    /// How many pixels are not exactly `background`, and the box around them as left, top, right, bottom (all inside).
    #[must_use]
    pub fn drawn(&self, background: [u8; 4]) -> (u64, Option<[u32; 4]>) {
        let (mut count, mut area) = (0, None);
        for y in 0..self.height {
            for x in (0..self.width).filter(|&x| self.pixel(x, y) != background) {
                count += 1;
                let [left, top, right, bottom] = area.unwrap_or([x, y, x, y]);
                area = Some([left.min(x), top.min(y), right.max(x), bottom.max(y)]);
            }
        }
        (count, area)
    }
}
