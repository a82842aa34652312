#!/usr/bin/env bash
# What a GPU has to say, in two commands that each end in time whatever fails, in the python3 that has torch for it:
#     bash benchmarks/gpu.sh bench [SECONDS]    # ceilings, benchmarks, tables: 480 s
#     bash benchmarks/gpu.sh tests [SECONDS]    # the tests that run on the device, then the sanitizer: 200 s
# Python packages it lacks may lie as wheels in .whl/ (`make gpu-bundle`). Results go to benchmarks/results/<device>/;
# where $OUT is set, those, the logs and the measured tiles go there too, as results-*.tgz. BENCH_COMMIT names the commit
# where there is no repository. Exit code 1 if a step failed; what the others found is saved after every step, so that
# a limit from outside takes the running step alone.
set -u
cd "$(dirname "$0")/.." || exit 1
what=${1:-}
total=${2:-$([ "$what" = bench ] && echo 480 || echo 200)}
case "$what" in bench | tests) ;; *) sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2 ;; esac
python=${PYTHON:-python3}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# The benchmarks tune once, also when both commands run on one machine.
export MDPGRPO_CACHE_DIR=${MDPGRPO_CACHE_DIR:-/tmp/mdpgrpo_tiles} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export TOKENIZERS_PARALLELISM=false PYTHONPATH=$PWD:$PWD/benchmarks:$PWD/tests
unset TRITON_INTERPRET
failed=()

left() { echo $((total - SECONDS)); }

save() {
    [ -n "${OUT:-}" ] || return 0
    rm -rf "$scratch/home" && mkdir -p "$scratch/home/logs"
    cp "$scratch"/*.log "$scratch/home/logs/"
    sed -i "s#$PWD/##g" "$scratch"/home/logs/*.log
    cp -r "$folder" mdpgrpo_fast/kernels/crossovers.json "$MDPGRPO_CACHE_DIR/tiles.json" "$scratch"/table.txt \
        "$scratch/home/" 2>/dev/null
    tar -czf "$OUT/results-$what.partial" -C "$scratch/home" . && mv "$OUT/results-$what.partial" "$OUT/results-$what.tgz"
}

# step NAME SECONDS COMMAND...: its log is kept, its end is shown, its failure is remembered.
step() {
    local name=$1 seconds=$2 begin=$SECONDS status
    shift 2
    [ "$seconds" -lt "$(left)" ] || seconds=$(left)
    if [ "$seconds" -lt 8 ]; then
        echo "== $name: left out, no time"
        failed+=("$name")
        return
    fi
    # An interrupt, so that pytest still says what failed until then.
    timeout -s INT -k 6 "$seconds" "$@" >"$scratch/$name.log" 2>&1
    status=$?
    echo "== $name: exit code $status, $((SECONDS - begin)) s"
    tail -n "${SHOW:-8}" "$scratch/$name.log" | cut -c 1-220
    [ "$status" -eq 0 ] || failed+=("$name")
    last=$status
    save
}

folder=$scratch/none
if compgen -G '.whl/*.whl' >/dev/null; then
    site=${TMPDIR:-/tmp}/mdpgrpo_site
    [ -d "$site" ] || step wheels 60 "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir \
        --upgrade --target "$site" .whl/*.whl
    export PYTHONPATH=$PYTHONPATH:$site
fi
# One process says all that is asked first: each import of torch takes seconds.
look() { "$python" benchmarks/warm.py --look "$scratch/folder" "$scratch/builds"; }
look || exit 1
folder=$(cat "$scratch/folder")
# The compiled parts travel with the checkout; built here only where they do not load.
if [ -s "$scratch/builds" ] && command -v nvcc >/dev/null; then
    MDPGRPO_BUILD=cuda step build 100 "$python" setup.py -q build_ext --inplace
    look || exit 1
fi

# op NAME SECONDS: a benchmark that stops itself and says what it left out; the limit of the step is for a hang.
op() {
    BENCH_SECONDS=$2 SHOW=1 step "$1" $(($2 + 30)) "$python" -m pytest "benchmarks/bench_$1.py" --benchmark-only -q \
        -p no:cacheprovider --benchmark-columns=median,rounds
}

bench() {
    # Beside the compilers; the model of the step is 2.5 GB on disk.
    "$python" benchmarks/bench_step.py --problem "$scratch/problem" --make-problem-only --output "$scratch/none" \
        >"$scratch/problem.log" 2>&1 &
    SHOW=40 step warm 100 "$python" benchmarks/warm.py --seconds 75
    wait
    # 3: a kernel is wrong or hangs. That of csrc/cuda must not take the time of the others.
    if [ "$last" -eq 3 ]; then
        echo "the Hopper kernel is left out"
        mkdir -p "$scratch/none" && export MDPGRPO_LIBRARIES=$scratch/none
    fi
    SHOW=1 step roofline 30 "$python" benchmarks/roofline.py
    SHOW=1 step tiles 10 "$python" benchmarks/tables/gpu_logs.py tiles "$scratch/warm.log" "$folder"
    # The most important first. A process needs some ten seconds to begin.
    op token_loss 40
    op linear_token_loss 40
    step generate 60 "$python" benchmarks/bench_generate.py --output "$folder/generate.json" --rounds 1
    step step 100 "$python" benchmarks/bench_step.py --output "$folder/step.json" --steps 1 --cases kl \
        --ways trl ours --problem "$scratch/problem" --no-memory
    op linear_logprobs 12
    op logprobs 12
    op advantages 8
    step packing 40 "$python" benchmarks/bench_packing.py --output "$folder/packing.json" --rounds 3
    # All four ways, with few new tokens.
    SHOW=12 step step_ways 90 "$python" benchmarks/bench_step.py --output "$folder/step_ways.json" --steps 1 --cases kl \
        --size gpu_short --problem "$scratch/problem" --no-memory
    if command -v ncu >/dev/null; then
        step counters 40 env MDPGRPO_AUTOTUNE=0 ncu --clock-control none --kernel-name regex:token_loss_kernel --section SpeedOfLight \
            --section WarpStateStats --section Occupancy --section InstructionStats --section MemoryWorkloadAnalysis \
            --section LaunchStats "$python" benchmarks/compiled/profiled_rows.py
        SHOW=1 step counted 10 "$python" benchmarks/tables/gpu_logs.py counters "$scratch/counters.log" "$folder"
    fi
    "$python" benchmarks/compiled/crossovers.py >"$scratch/crossovers.log" || failed+=(crossovers)
    "$python" benchmarks/tables/speed_table.py "$folder" >"$scratch/table.txt" || failed+=(table)
}

tests() {
    # Most of their time is the compiler's: one process per core. They need no measured tile, and would measure it
    # while others compute.
    local workers=()
    "$python" -c 'import xdist' 2>/dev/null && workers=(-n "$(($(nproc) - 1))")
    SHOW=60 step tests $(($(left) - 40)) env MDPGRPO_AUTOTUNE=0 OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 \
        "$python" -m pytest "${workers[@]}" tests/test_gpu.py tests/rollout/test_fixed.py tests/ops \
        tests/kernels/test_cuda.py tests/models/test_packing.py tests/rollout/test_sampling.py \
        tests/rollout/test_generate.py --ignore tests/ops/linear/test_sharded.py -m 'not code' -q -p no:cacheprovider \
        -p helpers.instant --timeout 60 --tb short -rfE --durations 12
    if command -v compute-sanitizer >/dev/null; then
        for tool in memcheck racecheck; do
            step "$tool" 40 env MDPGRPO_AUTOTUNE=0 compute-sanitizer --tool "$tool" --error-exitcode 9 \
                --kernel-name kernel_substring=token_loss_kernel "$python" benchmarks/compiled/hopper_smoke.py
        done
    fi
}

"$what"
save
[ ! -f "$scratch/table.txt" ] || cut -c 1-240 "$scratch/table.txt" | head -c 9000
if [ ${#failed[@]} -gt 0 ]; then
    echo "FAILED: ${failed[*]}"
    exit 1
fi
echo "all passed in $SECONDS s"
