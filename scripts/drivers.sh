# shellcheck shell=bash
# The Vulkan drivers that need no GPU, and how a command is told to use one of them. Sourced by the other scripts.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
drivers=(lavapipe swiftshader)

# Runs scripts/setup and takes over what it found. `lavapipe25`, a newer lavapipe, joins the drivers where there is one;
# where there is none, PINFOLD_LAVAPIPE25_MISSING says why.
prepare() {
    "$root/scripts/setup"
    # shellcheck source=/dev/null
    source "$root/.cache/env"
    if [[ -n $PINFOLD_LAVAPIPE25_ICD ]]; then
        drivers=(lavapipe lavapipe25 swiftshader)
    fi
}

# icd_of DRIVER prints the path of the driver's manifest.
icd_of() {
    case $1 in
        lavapipe) printf '%s\n' "$PINFOLD_LAVAPIPE_ICD" ;;
        lavapipe25) printf '%s\n' "$PINFOLD_LAVAPIPE25_ICD" ;;
        swiftshader) printf '%s\n' "$PINFOLD_SWIFTSHADER_ICD" ;;
        *) echo "unknown driver '$1': it is one of ${drivers[*]}" >&2; return 1 ;;
    esac
}

# on_driver DRIVER COMMAND... runs the command with the Vulkan loader limited to that driver. The second variable is
# the older name of the first; the third keeps Mesa's layer, which reorders devices, out of the way. Tests run one after the
# other: the validation layer finds what is a device's in a table without a lock (Vulkan-ValidationLayers, issue 4391), so a test
# that ends its device took another one's process down in one of a thousand runs.
on_driver() {
    local icd
    icd=$(icd_of "$1")
    PINFOLD_TEST_DRIVER=$1 VK_DRIVER_FILES=$icd VK_ICD_FILENAMES=$icd NODEVICE_SELECT=1 RUST_TEST_THREADS=1 "${@:2}"
}
