#!/usr/bin/env bash
# Everything that wants a GPU, in one go: the device's tests, the 200-epoch protocol, the benchmarks' ratios.
# Needs nothing from the network and installs nothing. Results come one by one into --out; the same command goes on
# where the time ran out.
#
# Usage: bash examples/gpu.sh [--dry-run] [--out DIR] [--data FILE] [--teacher FILE] [--minutes 8]
set -u
here=$(pwd)
cd "$(dirname "$0")/.."

out=runs/gpu minutes=8 dry="" data="" teacher=""
absolute() { case $1 in /*) echo "$1" ;; *) echo "$here/$1" ;; esac; }
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) dry=--dry-run; shift; continue ;;
    -h | --help) sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 0 ;;
  esac
  [ $# -ge 2 ] || { echo "$1 is unknown or lacks its value, see --help"; exit 2; }
  case $1 in
    --out) out=$(absolute "$2") ;;
    --data) data=$(absolute "$2") ;;
    --teacher) teacher=$(absolute "$2") ;;
    --minutes) minutes=$2 ;;
    *) echo "$1 is unknown, see --help"; exit 2 ;;
  esac
  shift 2
done

python=python3
[ -x .venv/bin/python ] && python=$(pwd)/.venv/bin/python
export PYTHONPATH="$(pwd):$(pwd)/examples${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 TQDM_DISABLE=1
missing=$("$python" - torch torchvision numpy scipy tqdm pytest <<'PYTHON'
import importlib.util
import sys

print(*(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None))
PYTHON
)
[ -z "$missing" ] || echo "not importable: $missing; python3 -m pip install 'torch>=2.4' torchvision numpy scipy tqdm pytest"
case " $missing " in *" torch "*) exit 1 ;; esac
device=cuda
[ -z "$dry" ] || device=cpu
[ -n "$dry" ] || "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
  { echo "no CUDA device: --dry-run rehearses on the CPU"; exit 1; }
[ -n "$data" ] || [ ! -f data/cifar100.npz ] || data=$(pwd)/data/cifar100.npz
[ -z "$dry" ] || minutes=60 # a rehearsal may meet a busy machine
mkdir -p "$out"

left() { echo $((minutes * 60 - SECONDS - 5)); }
failed=""
part() { # name, seconds at most, command: runs it, says how it went and goes on
  local name=$1 most=$2 code
  shift 2
  [ -z "$dry" ] && [ "$most" -le "$(left)" ] || most=$(left)
  [ "$most" -gt 0 ] || { echo "== $name: no time left"; return 0; }
  echo "== $name, at most $most s: $*"
  timeout --kill-after=10 "$most" "$@"
  code=$?
  echo "== $name: exit status $code, $SECONDS s since the beginning"
  [ "$code" = 0 ] || failed="$failed $name"
  return "$code"
}

# 1. correct? Warnings of a driver are no reason to lose a test
[ -f "$out/device_tests.xml" ] ||
  part tests 150 "$python" -m pytest tests/device -q -W default -p no:cacheprovider --junitxml="$out/device_tests.xml"

# 2. the protocol, with what the benchmarks leave it
reserve=0
[ -f "$out/loss.json" ] || reserve=60
[ -f "$out/step.json" ] || reserve=$((reserve + 40))
[ -f "$out/cifd.json" ] || reserve=$((reserve + 40))
protocol() { # flags: it stops by itself, 10 s before it would be stopped
  local seconds=$(($(left) - reserve))
  part protocol "$seconds" "$python" -m gpu_lane.protocol --device "$device" --out "$out" --seconds $((seconds - 10)) \
    ${dry:+"$dry"} ${data:+--data "$data"} ${teacher:+--teacher-checkpoint "$teacher"} "$@"
}
protocol || { [ "$(left)" -le $((reserve + 60)) ] || { echo "once more, without CUDA graphs"; protocol --eager; }; }

# 3. fast? Ratios alone carry over to other machines
for name in loss step cifd; do
  [ -f "$out/$name.json" ] ||
    part "benchmark-$name" 120 "$python" "benchmarks/$name.py" --device "$device" --out "$out" ${dry:+"$dry"}
done

[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }
