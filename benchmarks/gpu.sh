#!/usr/bin/env bash
# The GPU's tests, ceilings and benchmarks in one command of under 8 minutes, in the python3 that has torch for it:
#     bash benchmarks/gpu.sh
# Peers it lacks (liger-kernel, trl, ...) may lie as wheels in .whl/. Results go to benchmarks/results/<device>/, and
# with the logs to $OUT where that is set. BENCH_COMMIT names the commit where there is no repository. Exit code 1 if a
# step failed; the table at the end comes all the same.
set -u
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# The benchmarks tune once.
export MDPGRPO_CACHE_DIR=$scratch/tiles PYTHONPATH=$PWD PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
unset TRITON_INTERPRET
failed=()
total=470

# step NAME SECONDS COMMAND...: its log is kept, its end is shown, its failure is remembered.
step() {
    local name=$1 seconds=$2 begin=$SECONDS status
    shift 2
    [ "$seconds" -lt $((total - SECONDS)) ] || seconds=$((total - SECONDS))
    [ "$seconds" -gt 0 ] || seconds=1
    timeout -k 5 "$seconds" "$@" >"$scratch/$name.log" 2>&1
    status=$?
    echo "== $name: exit code $status, $((SECONDS - begin)) s"
    tail -n 12 "$scratch/$name.log" | cut -c 1-200
    [ "$status" -eq 0 ] || failed+=("$name")
}

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu.sh: $python has no torch that sees a GPU" >&2
    exit 1
fi
if compgen -G '.whl/*.whl' >/dev/null; then
    step wheels 60 "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
        --target "$scratch/site" .whl/*.whl
    export PYTHONPATH=$PWD:$scratch/site
fi

# Built here where there is nvcc; else what is there is used, if any.
if command -v nvcc >/dev/null; then
    MDPGRPO_BUILD=cuda step build 90 "$python" setup.py -q build_ext --inplace
fi
"$python" -c 'import mdpgrpo_fast; mdpgrpo_fast.backend_report()'

# Most of the tests' time is the compiler's: one process per core, where pytest-xdist is there.
workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n "$(($(nproc) / 2))")
# They need no measured tile, and would measure it while others compute.
step tests 240 env MDPGRPO_AUTOTUNE=0 "$python" -m pytest "${workers[@]}" tests/ops tests/models/test_packing.py \
    tests/rollout/test_sampling.py tests/rollout/test_generate.py --ignore tests/ops/linear/test_sharded.py \
    -q -p no:cacheprovider
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        step "$tool" 40 env MDPGRPO_AUTOTUNE=0 compute-sanitizer --tool "$tool" --error-exitcode 9 \
            --kernel-name kernel_substring=token_loss_kernel "$python" benchmarks/compiled/hopper_smoke.py
    done
fi
step roofline 40 "$python" benchmarks/roofline.py
step packing 40 "$python" benchmarks/bench_packing.py --output "$scratch/packing.json" --rounds 3
step generate 40 "$python" benchmarks/bench_generate.py --output "$scratch/generate.json" --rounds 2
step step 90 "$python" benchmarks/bench_step.py --output "$scratch/step.json" --steps 2 --cases kl
# Shares of what is left, the most important first. Each stops itself and says what it left out; the limit of a step is
# for a hang.
left=$((total - SECONDS - 10))
[ "$left" -le 300 ] || left=300
for part in token_loss:32 linear_token_loss:40 logprobs:9 linear_logprobs:11 advantages:5; do
    op=${part%:*} budget=$((left * ${part#*:} / 100))
    BENCH_SECONDS=$budget step "$op" $((budget + 30)) "$python" -m pytest "benchmarks/bench_$op.py" \
        --benchmark-only -q -p no:cacheprovider --benchmark-columns=median,iqr,rounds
done

folder=$("$python" benchmarks/tables/speed_table.py --folder) || failed+=(folder)
cp "$scratch"/{packing,generate,step}.json "$folder/" || failed+=(step)
if [ -n "${OUT:-}" ]; then
    mkdir -p "$OUT/${folder##*/}"
    cp "$folder"/{roofline,token_loss,linear_token_loss,logprobs,linear_logprobs,advantages,packing,generate,step}.json "$OUT/${folder##*/}/" || failed+=(copy)
    cat "$scratch"/*.log >"$OUT/gpu.log"
    cp "$scratch/tiles/tiles.json" "$OUT/" 2>/dev/null
fi
"$python" benchmarks/tables/speed_table.py || failed+=(table)
# Where `auto` takes the Hopper kernel from now on.
"$python" benchmarks/compiled/crossovers.py || failed+=(crossovers)
if [ ${#failed[@]} -gt 0 ]; then
    echo "FAILED: ${failed[*]}"
    exit 1
fi
echo "all passed in $SECONDS s"
