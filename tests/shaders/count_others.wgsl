// Counts the words of `data` that are not `expected`.

struct Count {
    words: u32,
    expected: u32,
    others: atomic<u32>,
}

@group(0) @binding(0) var<storage, read> data: array<u32>;
@group(0) @binding(1) var<storage, read_write> count: Count;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    var others = 0u;
    for (var i = id.x; i < count.words; i += 64u * groups.x) {
        others += select(0u, 1u, data[i] != count.expected);
    }
    if others != 0u {
        atomicAdd(&count.others, others);
    }
}
