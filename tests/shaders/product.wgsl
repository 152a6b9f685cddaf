// One view of a matrix times a vector: a row each invocation. How many rows the view has is what its length says.

var<immediate> first_row: u32;

@group(0) @binding(0) var<storage, read> weights: array<vec4f>;
@group(0) @binding(1) var<storage, read> vector: array<vec4f>;
@group(0) @binding(2) var<storage, read_write> product: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3u) {
    let columns = arrayLength(&vector);
    if id.x >= arrayLength(&weights) / columns {
        return;
    }
    var sum = vec4f();
    for (var column = 0u; column < columns; column++) {
        sum += weights[id.x * columns + column] * vector[column];
    }
    product[first_row + id.x] = sum.x + sum.y + sum.z + sum.w;
}
