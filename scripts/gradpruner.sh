#!/usr/bin/env bash
# Run GradPruner with its published settings: prune a model, fine-tune the result and measure it.
#
#     scripts/gradpruner.sh MODEL TRAIN_TEXT HELD_OUT_TEXT FOLDER [options of `prune recover`]
#
# A third of the layers (30 %) is dropped without merging, then three more with merging (MERGED_LAYERS sets another
# number). LoRA: rank 8, alpha 32, all linear layers, learning rate 1e-4, batches of 4. The length of fine-tuning is not
# published: one epoch, unless the options set another.
set -euo pipefail
model=$1 data=$2 held_out=$3 folder=$4
shift 4
lora=(--rank 8 --alpha 32 --learning-rate 1e-4 --batch-size 4)
mkdir -p "$folder"

impart-hf prune importance "$model" --data "$data" --steps 40 "${lora[@]}" --output "$folder/scores"
impart-hf prune layers "$model" "$folder/dropped" --importance "$folder/scores" --ratio 0.3 --no-merge
impart-hf prune importance "$folder/dropped" --data "$data" --steps 40 "${lora[@]}" --top-percent 20 \
    --output "$folder/scores-dropped"
impart-hf prune layers "$folder/dropped" "$folder/merged" --importance "$folder/scores-dropped" --drop "${MERGED_LAYERS:-3}"
impart-hf prune recover "$folder/merged" "$folder/recovered" --data "$data" "${lora[@]}" "$@"
impart-hf evaluate "$model" "$folder/dropped" "$folder/merged" "$folder/recovered" --text "$held_out"
