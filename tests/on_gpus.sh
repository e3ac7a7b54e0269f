#!/usr/bin/env bash
# Runs what needs GPUs: the tests on all of them and across processes, the kernels under compute-sanitizer, and the
# benchmark.
#
#   tests/on_gpus.sh [LOG_FOLDER]     with the package installed with CUDA and the extra test
#
# Ends with a line per part, and fails if one of them did.
set -u
cd "$(dirname "$0")/.."
logs=${1:-out/gpu-tests}
mkdir -p "$logs"
# Multicast of NVLink stays off, whatever NCCL would choose. Processes share the GPUs' memory.
export JAX_EP_REQUIRE=cuda NCCL_NVLS_ENABLE=0 XLA_PYTHON_CLIENT_PREALLOCATE=false PYTHONUNBUFFERED=1
failed=0

part() {  # NAME SECONDS COMMAND...
  local name=$1 seconds=$2 start=$SECONDS
  shift 2
  if timeout --kill-after=20 "$seconds" "$@" >"$logs/$name.log" 2>&1; then local verdict=passed; else local verdict=FAILED; failed=1; fi
  printf '%-24s %s in %d s: %s\n' "$name" "$verdict" $((SECONDS - start)) \
    "$(grep -E '^(=+ )?[0-9]+ (passed|failed).*|ERROR SUMMARY' "$logs/$name.log" | tail -n 2 | tr '\n' ' ')"
}

gpus=$(nvidia-smi -L | wc -l)
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | sort | uniq -c
python3 -c 'import jax; print("jax", jax.__version__)'

part "ops-$gpus-gpus" 400 python3 -m pytest -q --durations=10 tests/test_ops.py tests/test_errors.py
part "layers-$gpus-gpus" 400 python3 -m pytest -q --durations=10 tests/test_nn.py tests/test_compat.py tests/test_compat_errors.py tests/test_stats.py tests/test_doctor.py \
  tests/test_profiling.py tests/test_packaging.py
part "balancing-$gpus-gpus" 500 python3 -m pytest -q --durations=10 tests/test_eplb_routing.py tests/test_eplb_transfer.py
part "examples-$gpus-gpus" 500 python3 -m pytest -q --durations=10 tests/test_examples.py tests/test_olmoe.py tests/test_load_mixtral.py
part "processes-$gpus-gpus" 300 python3 -m pytest -q --durations=10 tests/test_processes.py
# The kernels alone: under a sanitizer the whole suite crashes, see docs/testing.md.
build=build/cuda-ops-test
part build-cuda-ops-test 300 sh -c "cmake -S . -B $build -DPython_EXECUTABLE=$(command -v python3) -DJAX_EP_CUDA=ON \
  -DJAX_EP_CUDA_ARCHITECTURES=90 && cmake --build $build --parallel --target cuda_ops_test"
part "cuda-ops-$gpus-gpus" 120 "$build/cuda_ops_test" 50
# Enabling access to a peer again is an error of the API that is expected, and cleared.
for tool in memcheck racecheck; do
  part "$tool-$gpus-gpus" 200 compute-sanitizer --tool "$tool" --report-api-errors no --error-exitcode 9 "$build/cuda_ops_test" 10
done
# Rounds of changing routing, each checked on the device, in both modes.
if [ "$gpus" -gt 1 ]; then
  part stress 200 python3 -m jax_ep.bench --stress 20000
  part stress-low-latency 300 python3 -m jax_ep.bench --workload decode --stress 200000
  part transfer 120 python3 -m jax_ep.bench --transfer --json "$logs/transfer.json"
fi
part experts 300 python3 -m jax_ep.bench --experts 64 --json "$logs/experts.json"
# What the tables of docs/performance.md are made of.
bench="python3 -m jax_ep.bench --skip-stock --no-comparisons"
for devices in 1 2 4; do
  [ "$devices" -le "$gpus" ] || continue
  part "train-4k-$devices" 120 $bench --devices "$devices" --json "$logs/train-4k-$devices.json"
  part "decode-$devices" 120 $bench --workload decode --devices "$devices" --json "$logs/decode-$devices.json"
done
part doctor 120 python3 -m jax_ep.doctor --plot "$logs/doctor.png" --json "$logs/doctor.json"
exit $failed
