#!/usr/bin/env bash
# Train one En-Vi Transformer: train.sh DATA_BIN SAVE_DIR adam|ga_sam [mini|paper] [SEED] [further fairseq-train flags]
# The methods differ by the lines of the `case` below and by nothing else. Starting it again continues the run.
set -euo pipefail
if [ $# -lt 3 ]; then
    sed -n 2,3p "$0" >&2
    exit 2
fi
data_bin=$1 save_dir=$2 method=$3 size=${4:-mini} seed=${5:-1}
shift $(($# < 5 ? $# : 5))
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

case $size in
mini) # 20,000 pairs on CPU; the start epoch is the paper's share of the run (30 of 52 epochs)
    start_epoch=9
    size_flags=(--arch transformer --encoder-layers 2 --decoder-layers 2
        --encoder-embed-dim 192 --decoder-embed-dim 192 --encoder-ffn-embed-dim 384 --decoder-ffn-embed-dim 384
        --encoder-attention-heads 4 --decoder-attention-heads 4
        --dropout 0.3 --max-tokens 2048 --lr 1e-3 --warmup-updates 800 --max-epoch 14 --keep-last-epochs 5) ;;
paper) # GA-SAM B.3: transformer_wmt_en_de, 52 epochs, average of the last 10 checkpoints
    start_epoch=30
    size_flags=(--arch transformer_wmt_en_de
        --dropout 0.3 --max-tokens 4096 --lr 5e-4 --warmup-updates 4000 --max-epoch 52 --keep-last-epochs 10) ;;
*)
    echo "size must be mini or paper, got $size" >&2
    exit 2 ;;
esac

case $method in
adam) method_flags=(--optimizer adam) ;;
ga_sam) # GA-SAM C.2.3: L-infinity, epsilon 0.9 on the summed gradient, K = 2
    method_flags=(--optimizer ga_sam --base-optimizer adam --sam-epsilon 0.9 --sam-norm linf --sam-steps 2
        --sam-gradient sum --sam-start-epoch "$start_epoch") ;;
*)
    echo "method must be adam or ga_sam, got $method" >&2
    exit 2 ;;
esac

fairseq-train "$data_bin" --user-dir "$root/fairseq_sam" --save-dir "$save_dir" --seed "$seed" \
    "${method_flags[@]}" --adam-betas '(0.9, 0.98)' --weight-decay 1e-4 --clip-norm 0.0 \
    --lr-scheduler inverse_sqrt --warmup-init-lr 1e-7 \
    --criterion label_smoothed_cross_entropy --label-smoothing 0.1 --share-decoder-input-output-embed \
    "${size_flags[@]}" --no-progress-bar --log-interval 100 "$@"
