// Draws one primitive of a glTF mesh: base colour, one lamp beside the camera, light from the sky and the ground.
//
// Lighting happens in view space, where the camera is the origin and looks along -Z, so no descriptor is needed:
// all that varies fits in the 128 bytes of push constants that every Vulkan device has.

struct Draw {
    // Rows of the 3x4 matrix from the mesh to view space.
    row_x: vec4f,
    row_y: vec4f,
    row_z: vec4f,
    // clip = (x * projection.x, y * projection.y, z * projection.z + projection.w, -z)
    projection: vec4f,
    // Linear RGB, and the side of the surface that `front_facing` means: 1, or -1 where the matrix mirrors.
    colour: vec4f,
    // The direction that is up in the scene, in view space.
    up: vec4f,
}

var<immediate> draw: Draw;

struct Surface {
    @builtin(position) clip: vec4f,
    @location(0) position: vec3f,
    @location(1) normal: vec3f,
}

fn place(position: vec3f) -> Surface {
    let p = vec4f(position, 1.0);
    let view = vec3f(dot(draw.row_x, p), dot(draw.row_y, p), dot(draw.row_z, p));
    var out: Surface;
    out.clip = vec4f(view.xy * draw.projection.xy, view.z * draw.projection.z + draw.projection.w, -view.z);
    out.position = view;
    out.normal = vec3f(0.0);
    return out;
}

@vertex
fn vertex_smooth(@location(0) position: vec3f, @location(1) normal: vec3f) -> Surface {
    var out = place(position);
    // Normals go with the cofactors of the matrix (the inverse transpose up to a factor), so uneven scales are right.
    let x = draw.row_x.xyz;
    let y = draw.row_y.xyz;
    let z = draw.row_z.xyz;
    out.normal = draw.colour.w * vec3f(dot(cross(y, z), normal), dot(cross(z, x), normal), dot(cross(x, y), normal));
    return out;
}

@vertex
fn vertex_flat(@location(0) position: vec3f) -> Surface {
    return place(position);
}

fn shade(position: vec3f, normal: vec3f) -> vec4f {
    let eye = normalize(-position);
    let key = normalize(vec3f(-0.45, 0.65, 0.6));
    let sky = 0.5 + 0.5 * dot(normal, draw.up.xyz);
    let ambient = mix(vec3f(0.13, 0.12, 0.11), vec3f(0.34, 0.37, 0.42), sky);
    let diffuse = 0.70 * max(dot(normal, key), 0.0);
    let gloss = 0.14 * pow(max(dot(normal, normalize(key + eye)), 0.0), 40.0);
    return vec4f(draw.colour.rgb * (ambient + diffuse) + gloss, 1.0);
}

// The normal of the triangle itself, towards the viewer.
fn facet(position: vec3f) -> vec3f {
    let across = cross(dpdx(position), dpdy(position));
    let flat_normal = across * inverseSqrt(max(dot(across, across), 1e-30));
    return select(flat_normal, -flat_normal, dot(flat_normal, position) > 0.0);
}

@fragment
fn fragment_smooth(in: Surface, @builtin(front_facing) front: bool) -> @location(0) vec4f {
    // Derivatives need uniform control flow, so the fallback for a normal of no length is made in any case.
    let flat_normal = facet(in.position);
    let length2 = dot(in.normal, in.normal);
    let given = in.normal * inverseSqrt(max(length2, 1e-30));
    let normal = select(flat_normal, select(-given, given, front), length2 > 1e-30);
    return shade(in.position, normal);
}

@fragment
fn fragment_flat(in: Surface) -> @location(0) vec4f {
    return shade(in.position, facet(in.position));
}
