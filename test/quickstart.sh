#!/usr/bin/env bash
# The main job on real images, without a download of data: trains a small teacher on scikit-learn's handwritten
# digits, distils EvoLeViT_128S from it (layer-wise, then stage-wise token selection), evaluates, draws, prints a table.
# bash test/quickstart.sh [--line LINE]   (a version line of evo_vit/lines.py)
set -euo pipefail
cd "$(dirname "$0")/.."
. test/venv.sh
line=current venv=.venv
case "${1:-}" in
    "") ;;
    --line) line=${2:?error: --line needs the name of a line}; venv=.venv-$line ;;
    --line=*) line=${1#*=}; venv=.venv-$line ;;
    *) echo "error: unknown argument $1; the only one is --line LINE" >&2; exit 2 ;;
esac
make_venv "$venv" "$line"
python=$venv/bin/python
start=$SECONDS

recipe=(--device cpu --data-set DIGITS --input-size 112 --batch-size 32 --lr 0.016 --warmup-epochs 0
        --mixup 0 --cutmix 0 --aa none --color-jitter 0 --reprob 0 --no-repeated-aug)

echo "== 1/4 teacher: regnety_002"
"$python" main.py "${recipe[@]}" --model regnety_002 --distillation-type none --clip-grad 0 --no-model-ema \
    --epochs 7 --output_dir save/teacher
echo "== 2/4 student: EvoLeViT_128S, distilled"
"$python" main.py "${recipe[@]}" --model EvoLeViT_128S --teacher-model regnety_002 \
    --teacher-path save/teacher/best_checkpoint.pth --stage-wise-epoch 15 --model-ema-decay 0.99 --epochs 20
echo "== 3/4 evaluation: python main.py --eval"
"$python" main.py --eval --device cpu
echo "== 4/4 pages to look at: the kept tokens, the curves"
"$python" visualize.py
"$python" report.py save save/teacher
"$python" -m runtime.keeping.table teacher=save/teacher student=save
echo "minutes: $(( (SECONDS - start) / 60 )):$(printf %02d $(( (SECONDS - start) % 60 ))) after installation"
