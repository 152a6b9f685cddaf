// Triangles whose corners are a place and a colour, as they come.

struct Corner {
    @builtin(position) place: vec4f,
    @location(0) colour: vec4f,
}

@vertex
fn corner(@location(0) place: vec2f, @location(1) colour: vec4f) -> Corner {
    return Corner(vec4f(place, 0.0, 1.0), colour);
}

@fragment
fn pixel(corner: Corner) -> @location(0) vec4f {
    return corner.colour;
}
