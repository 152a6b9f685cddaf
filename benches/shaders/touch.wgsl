// What a GPU does with memory, as plainly as can be: one kernel reads all of it, one writes all of it.

@group(0) @binding(0) var<storage, read_write> data: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read_write> sums: array<u32>;

const WIDTH: u32 = 64u;

// Each thread adds up every `threads`-th vector, so that neighbours read neighbours.
@compute @workgroup_size(WIDTH)
fn read(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let threads = groups.x * WIDTH;
    let count = arrayLength(&data);
    var sum = vec4<u32>(0u);
    for (var at = id.x; at < count; at += threads) {
        sum += data[at];
    }
    sums[id.x] = sum.x + sum.y + sum.z + sum.w;
}

@compute @workgroup_size(WIDTH)
fn write(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let threads = groups.x * WIDTH;
    let count = arrayLength(&data);
    let word = id.x;
    for (var at = id.x; at < count; at += threads) {
        data[at] = vec4<u32>(word, word + 1u, word + 2u, word + 3u);
    }
}
