// Shows a frame as it lies in somebody's memory: pixels of four bytes, red first, in rows of `stride` pixels.

struct Rows {
    stride: u32,
}

var<immediate> rows: Rows;

@group(0) @binding(0) var<storage, read> pixels: array<u32>;

// One triangle that covers the picture.
@vertex
fn cover(@builtin(vertex_index) corner: u32) -> @builtin(position) vec4f {
    return vec4f(f32(corner & 1) * 4.0 - 1.0, f32(corner >> 1) * 4.0 - 1.0, 0.0, 1.0);
}

@fragment
fn show(@builtin(position) at: vec4f) -> @location(0) vec4f {
    return unpack4x8unorm(pixels[u32(at.y) * rows.stride + u32(at.x)]);
}
