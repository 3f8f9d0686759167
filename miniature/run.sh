#!/usr/bin/env bash
# The miniature from nothing: autoencoder, U-Net with text encoder, ControlNet, and the gates. It goes on where it was
# stopped. Settings of RunConfig follow: miniature/run.sh device=cpu seed=1
set -eu
cd "$(dirname "$0")/.."
PY=${PY:-.venv/bin/python}
OUT=${OUT:-out/miniature}
# glibc would give every large tensor back to the system and take it again, page by page: a tenth of a step. For the
# trainings alone: evaluate.py measures memory as users have it.
KEEP_MEMORY="env MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000"
for stage in autoencoder text_to_image controlnet; do
    case $stage in
        autoencoder) input= ;;
        text_to_image) input=vae=$OUT/autoencoder/vae ;;
        controlnet) input=base=$OUT/text_to_image/base ;;
    esac
    $KEEP_MEMORY $PY "miniature/train_$stage.py" "miniature/cfg/$stage.json" output_dir="$OUT" resume_from_checkpoint=latest \
        $input "$@"
done
rm -rf "$OUT/base"
cp -r "$OUT/text_to_image/base" "$OUT/base"
cp -r "$OUT/controlnet/controlnet" "$OUT/base/controlnet"
$PY miniature/evaluate.py base="$OUT/base" output_dir="$OUT"
