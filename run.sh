#!/usr/bin/env bash
# Sets up and runs, on a machine with only Python 3.11 or newer and git:
#
#   bash run.sh demo [arguments of particle-explorer demo]   the main job on the sample
#   bash run.sh test [arguments of pytest]                   the tests, windows on a virtual screen
#
# Python packages go into .venv here, at the versions of constraints.txt. System packages are installed
# when this runs as root on Debian or its relatives; otherwise one line says which are missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

say() { printf '==> %s\n' "$*" >&2; }
fail() {
    printf 'run.sh: %s\n' "$*" >&2
    exit 1
}

# What Qt and OpenGL load on Linux, as "library Debian-package".
LIBRARIES="
libEGL.so.1 libegl1
libGL.so.1 libgl1
libGLX_mesa.so.0 libglx-mesa0
libX11-xcb.so.1 libx11-xcb1
libdbus-1.so.3 libdbus-1-3
libfontconfig.so.1 libfontconfig1
libglib-2.0.so.0 libglib2.0-0
libgssapi_krb5.so.2 libgssapi-krb5-2
libxcb-cursor.so.0 libxcb-cursor0
libxcb-icccm.so.4 libxcb-icccm4
libxcb-image.so.0 libxcb-image0
libxcb-keysyms.so.1 libxcb-keysyms1
libxcb-randr.so.0 libxcb-randr0
libxcb-render-util.so.0 libxcb-render-util0
libxcb-shape.so.0 libxcb-shape0
libxcb-sync.so.1 libxcb-sync1
libxcb-xfixes.so.0 libxcb-xfixes0
libxcb-xkb.so.1 libxcb-xkb1
libxkbcommon-x11.so.0 libxkbcommon-x11-0
libxkbcommon.so.0 libxkbcommon0
"

missing_packages() { # demo|test → the Debian packages that are not there
    [ "$(uname -s)" = Linux ] || return 0
    local known library package
    known=$(PATH="$PATH:/sbin:/usr/sbin" ldconfig -p)
    while read -r library package; do
        [ -z "$library" ] || grep -qF "$library " <<<"$known" || printf '%s ' "$package"
    done <<<"$LIBRARIES"
    compgen -G '/usr/lib*/*/dri/*_dri.so' >/dev/null || compgen -G '/usr/lib*/dri/*_dri.so' >/dev/null ||
        printf 'libgl1-mesa-dri '
    [ -n "$(find -L /usr/share/fonts /usr/local/share/fonts -name '*.ttf' -print -quit 2>/dev/null)" ] ||
        printf 'fonts-dejavu-core '
    [ "$1" != test ] || command -v Xvfb >/dev/null || printf 'xvfb xauth '
}

may_install() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }

install_packages() {
    say "installing system packages: $*"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3 python3.14 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "needs Python 3.11 or newer; set PYTHON to one"
}

set_up() { # demo|test extras
    local missing stamp wanted python
    missing=$(missing_packages "$1")
    if [ -n "$missing" ]; then
        # shellcheck disable=SC2086 # a list of words
        if may_install; then
            install_packages $missing
        elif [ "$1" = test ]; then
            fail "missing system packages; as root: apt-get install $missing"
        else
            say "the window needs system packages that are missing; as root: apt-get install $missing"
        fi
    fi

    if ! .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$(find_python)
        if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
            may_install || fail "missing system packages; as root: apt-get install python3-venv"
            install_packages python3-venv
        fi
        "$python" -m venv --clear .venv
    fi

    # the demo needs less than the tests; what was installed for the tests serves both
    wanted=$(cat pyproject.toml constraints.txt <(pwd) | cksum)
    for stamp in ".venv/installed-$2" .venv/installed-napari,dev; do
        if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then return; fi
    done
    say "installing Python packages into .venv; the first time takes some minutes, PyTorch is large"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".[$2]" -c constraints.txt
    printf '%s\n' "$wanted" >".venv/installed-$2"
}

case "${1:-}" in
demo)
    shift
    set_up demo napari
    exec .venv/bin/particle-explorer demo "$@"
    ;;
test)
    shift
    set_up test napari,dev
    export QT_API="${QT_API:-pyside6}"
    export PYTEST_QT_API="$QT_API"
    exec .venv/bin/python -X faulthandler -m pytest "$@"
    ;;
*)
    printf 'usage: bash run.sh demo | bash run.sh test\n' >&2
    exit 2
    ;;
esac
