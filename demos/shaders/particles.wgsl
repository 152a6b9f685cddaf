// Draws particles as points of light that add up, as they lie in the program's memory: a place, a velocity, and which galaxy it is of.

struct View {
    // Rows of the 3x4 matrix from the world to the camera.
    row_x: vec4f,
    row_y: vec4f,
    row_z: vec4f,
    // x and y: the projection's scale; z: the near plane; w: how bright a particle is.
    projection: vec4f,
}

var<immediate> view: View;

struct Light {
    @builtin(position) clip: vec4f,
    @location(0) colour: vec3f,
}

@vertex
fn place(@location(0) position: vec3f, @location(1) velocity: vec3f, @location(2) kind: f32) -> Light {
    let p = vec4f(position, 1.0);
    let at = vec3f(dot(view.row_x, p), dot(view.row_y, p), dot(view.row_z, p));
    // The faster, the hotter.
    let heat = clamp(length(velocity) * 0.45 - 0.35, 0.0, 1.0);
    let warm = mix(vec3f(1.0, 0.34, 0.11), vec3f(1.0, 0.84, 0.60), heat);
    let cold = mix(vec3f(0.14, 0.30, 1.0), vec3f(0.58, 0.80, 1.0), heat);
    var light: Light;
    light.clip = vec4f(at.x * view.projection.x, -at.y * view.projection.y, view.projection.z, -at.z);
    light.colour = mix(warm, cold, kind) * view.projection.w;
    return light;
}

@fragment
fn shine(light: Light) -> @location(0) vec4f {
    return vec4f(light.colour, 1.0);
}
