#!/bin/sh
# Makes the Debian package of a board: build.sh WHEEL MAN_PAGE OUT. `make deb` calls it, with these variables:
#   PYTHON          a Python with pip and the program installed (default: python3)
#   ARCH            amd64 or arm64 (default: this machine's); nothing of the package is run to make it
#   PYTHON_VERSION  of the boards: 3.11 for Debian 12, 3.13 for Debian 13 (default: that of PYTHON)
#   DEBFULLNAME, DEBEMAIL   who maintains the package, as Debian's tools have it
#   SOURCE_DATE_EPOCH       its time (default: now)
# docs/adr/0038-a-debian-package.md says why it is made like this.
set -eu
wheel=$1 man_page=$2 out=$3
here=$(dirname "$0")
python=${PYTHON:-python3}
arch=${ARCH:-$(dpkg --print-architecture)}
python_version=${PYTHON_VERSION:-$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')}
case $arch in
    amd64) machine=x86_64 ;;
    arm64) machine=aarch64 ;;
    *) echo "make deb: ARCH=$arch: want amd64 or arm64, onnxruntime has no packages for others" >&2; exit 1 ;;
esac
export SOURCE_DATE_EPOCH="${SOURCE_DATE_EPOCH:-$(date +%s)}"
glibc=36 # 2.36 is that of Debian 12
maintainer="${DEBFULLNAME:-aiflow-edge} <${DEBEMAIL:-aiflow-edge@localhost.localdomain}>"
version=$(basename "$wheel" | cut -d- -f2 | sed 's/\.dev/~dev/')
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root=$work/root opt=$work/root/opt/aiflow-edge

# A virtual environment without its pip. The packages are outside of lib/pythonX.Y, so that the paths of the shipped
# bundles stay when a board gets another Python.
mkdir -p "$opt/bin" "$opt/lib/python$python_version/site-packages"
ln -s "/usr/bin/python$python_version" "$opt/bin/python3"
printf 'home = /usr/bin\nversion = %s\n' "$python_version" >"$opt/pyvenv.cfg"
echo /opt/aiflow-edge/packages >"$opt/lib/python$python_version/site-packages/packages.pth"

# pip takes no hashes for what it resolves by itself, so the versions are pinned and the hashes compared afterwards.
# Nothing of a wheel has run by then.
sed '/--hash/d; s/ *\\$//' "$here/../constraints.txt" >"$work/versions.txt"
platforms=$(for minor in $(seq $glibc -1 17); do echo "--platform=manylinux_2_${minor}_$machine"; done)
"$python" -m pip install --quiet --no-compile --only-binary=:all: --implementation=cp $platforms \
    "--python-version=$python_version" --constraint="$work/versions.txt" --report="$work/report.json" \
    --target="$opt/packages" "$wheel[board,signed]"
"$python" - "$work/report.json" "$here/../constraints.txt" <<'PYTHON'
import json, sys
report, pins = (open(name).read() for name in sys.argv[1:])
for item in json.loads(report)["install"]:
    if item["metadata"]["name"] != "aiflow-edge":
        file = item["download_info"]
        if "sha256:" + file["archive_info"]["hashes"]["sha256"] not in pins:
            sys.exit(f"make deb: {file['url']} does not have a hash of constraints.txt")
PYTHON
sed '1s|.*|#!/opt/aiflow-edge/bin/python3|' "$opt/packages/bin/aiflow" >"$opt/bin/aiflow"
chmod 755 "$opt/bin/aiflow"
find "$opt/packages" -type f -exec chmod 644 {} + # none is run by its name
rm -r "$opt/packages/bin" "$opt"/packages/aiflow_edge-*.dist-info/direct_url.json

share=$root/usr/share
mkdir -p "$root/usr/bin" "$root/usr/lib/sysusers.d" "$share/man/man1" "$share/doc/aiflow-edge" \
    "$share/lintian/overrides" "$share/bash-completion/completions" "$share/zsh/vendor-completions" \
    "$share/fish/vendor_completions.d"
ln -s /opt/aiflow-edge/bin/aiflow "$root/usr/bin/aiflow"
"$python" -c 'from firmware_tools.systemd_units import ACCOUNT; print(ACCOUNT)' >"$root/usr/lib/sysusers.d/aiflow-edge.conf"
"$python" -m firmware_tools completion bash >"$share/bash-completion/completions/aiflow"
"$python" -m firmware_tools completion zsh >"$share/zsh/vendor-completions/_aiflow"
"$python" -m firmware_tools completion fish >"$share/fish/vendor_completions.d/aiflow.fish"
gzip -9n <"$man_page" >"$share/man/man1/aiflow.1.gz"
gzip -9n <"$here/../CHANGELOG.md" >"$share/doc/aiflow-edge/CHANGELOG.md.gz"
printf 'aiflow-edge (%s) stable; urgency=medium\n\n  * See CHANGELOG.md.\n\n -- %s  %s\n' "$version" "$maintainer" \
    "$(date --utc --rfc-email --date="@$SOURCE_DATE_EPOCH")" | gzip -9n >"$share/doc/aiflow-edge/changelog.gz"
cp "$here/copyright" "$share/doc/aiflow-edge/"
cp "$here/lintian-overrides" "$share/lintian/overrides/aiflow-edge"

mkdir "$root/DEBIAN"
sed "s/@VERSION@/$version/; s/@ARCH@/$arch/; s/@PYTHON@/python$python_version/; s/@SIZE@/$(du -sk "$root" | cut -f1)/
    s/@MAINTAINER@/$maintainer/; s/@GLIBC@/2.$glibc/
    s/@SUMMARY@/$(sed -n 's/^description = //p' "$here/../setup.cfg")/" "$here/control" >"$root/DEBIAN/control"
for script in postinst prerm postrm; do install -m 755 "$here/$script" "$root/DEBIAN/"; done
chmod -R u=rwX,go=rX "$root"
(cd "$root" && find opt usr -type f -print0 | LC_ALL=C sort -z | xargs -0 md5sum >DEBIAN/md5sums)
dpkg-deb --root-owner-group --build "$root" "$out"
