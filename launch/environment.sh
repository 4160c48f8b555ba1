# Sourced by the other scripts: makes .venv at the top of the repository and puts it on PATH.
# usage: source environment.sh EXTRA, where EXTRA is an extra of pyproject.toml
# Works from nothing with Python 3.11 or newer (PYTHON names another than python3), and installs
# again only after pyproject.toml has changed.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "alto-ds needs Python 3.11 or newer; '$python' is not. Set PYTHON to one that is." >&2
    exit 1
fi
gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
if [ "$gpus" -eq 0 ]; then export DS_ACCELERATOR=cpu; fi
# What the scripts that train begin with; options that come later replace these.
demo=(--deepspeed_config configs/gpt2-tiny/zero2.json --model gpt2-tiny --output_dir runs/demo)
if [ -n "${ALTO_DS_INSTALLED:-}" ]; then return; fi # the caller's environment has all that is needed

# `install ENVIRONMENT PACKAGES...` by pip, with a build of PyTorch that fits the machine.
install() {
    local pip=("$1/bin/python" -m pip --disable-pip-version-check install --quiet)
    [ -x "$1/bin/python" ] || "$python" -m venv "$1"
    # First, so that no other package chooses a build of PyTorch.
    if [ "$gpus" -eq 0 ]; then "${pip[@]}" torch==2.13.0; else "${pip[@]}" 'torch>=2.11'; fi
    # Without it DeepSpeed's installation asks for a CUDA compiler, which it does not use.
    DS_IGNORE_CUDA_DETECTION=1 "${pip[@]}" "${@:2}"
}

stamp=".venv/installed-$1-$(cksum <pyproject.toml | tr -d ' ')"
if [ ! -f "$stamp" ]; then
    echo "Installing alto-ds[$1] into .venv ..."
    install .venv --editable ".[$1]"
    touch "$stamp"
fi

export PATH="$PWD/.venv/bin:$PATH"
# The cache is keyed by the version of Python alone, so environments must not share it.
export TORCH_EXTENSIONS_DIR="$PWD/.venv/torch_extensions"
