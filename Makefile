# make run        compare correct and faulty training loops with what is expected of them
# make test       lint, types, tests
# make lint       ruff and mypy alone
# make bench      the benchmarks
# make calibrate  measure rounding on correct code: what the limits are set by
# make search     check 10,500 generated correct loops, 20 minutes; begun again, it goes on
# make search-mutants  rewrite reports/search.*: generated cases until each mutant is found
# make planted    rewrite reports/planted.md: trainers with one fault under all suites, an hour
# make wheel      build the wheel and use it where there is no clone
# make detection  the whole detection matrix: every mutant and trainer, minutes
# make starts     200 starts and ends of DDP workers, launched groups, and the memory of a sharded model
# make traffic    rewrite reports/traffic.*: what ranks send each other, loop by loop
# make coverage   branches that the tests reach, layer by layer: fails below what is stated
# make claims     rewrite reports/claims.md: what is claimed of accumulation, with numbers
# make examples   rewrite reports/examples: one result and page for every cause
# make examples-check  compare them with what the loops give now
# make pictures   keep a picture of every example page, at two widths and in both themes, to be looked at
# make env-NAME   an environment for one family of frameworks: transformers, lightning, deepspeed, jax, keras
# make envs       all of them
# make test-frameworks  the trainers and scripts of every framework, each in its environment
# make conformance  rewrite reports/conformance: what each framework's release does, claim by claim
# make readme     rewrite the generated parts of the README

SHELL  := bash
PYTHON ?= python3
BIN    := .venv/bin
STAMP  := .venv/installed

# One thread: reductions split over threads differ in the last bits, and two cores are soon shared.
export OMP_NUM_THREADS ?= 1

RIGHT := plain_mean clipped scheduled tail token_weighted amp_bf16 logged
WRONG := eq101_missing_division_plain eq103_mean_of_means_tokens eq201_batch_norm_1d \
	eq301_zero_grad_in_cycle eq306_clip_by_norm eq307_scheduler_per_micro_batch

.PHONY: run test search search-mutants planted wheel lint bench calibrate properties detection starts traffic coverage claims examples examples-check \
	pictures \
	readme envs test-frameworks conformance conformance-heads

run: $(STAMP)
	@$(BIN)/equivcheck run $(RIGHT:%=fixtures/trainers/%.py) --json reports/latest/trainers.json \
		--html reports/latest/trainers.html
	@for mutant in $(WRONG); do \
		code=$${mutant%%_*}; \
		$(BIN)/equivcheck run fixtures/mutants/$$mutant.py --expect $$code \
			--json reports/latest/$$mutant.json --html reports/latest/$$mutant.html || exit; \
	done
	@echo; echo "as expected: $(words $(RIGHT)) correct loops, $(words $(WRONG)) faulty ones"

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m pytest tests/bench --benchmark-enable --benchmark-only -s

calibrate: $(STAMP)
	@$(BIN)/python -W ignore tests/bench/calibrate.py

search: $(STAMP)
	nice -n 10 $(BIN)/python -W ignore tests/bench/generated.py correct --count 100 --pieces 105 \
		--out reports/latest/generated.jsonl
	$(BIN)/python tests/bench/generated.py table reports/latest/generated.jsonl

search-mutants: $(STAMP)
	$(BIN)/python -W ignore tests/bench/generated.py mutants --pieces 5 --out reports/search.json

planted: $(STAMP)
	$(BIN)/python -W ignore tests/bench/planted.py

wheel: $(STAMP)
	$(BIN)/python -m pytest tests/suites/test_wheel.py -m "slow or not slow"

properties: $(STAMP)
	$(BIN)/python -m pytest tests/detection/test_properties.py tests/plugin -m "slow or not slow" \
		--hypothesis-profile=thorough --timeout=3600

detection: $(STAMP)
	$(BIN)/python -m pytest tests/detection -m "slow or not slow"

# As tests/unit/test_layers.py has them, which compares these lists with its own. A deadline is as hard to get right.
LAYERS_0_1 := errors.py case.py causes/* result.py rows.py shape.py split.py differences.py attribution.py noise.py \
	counting.py sampled.py tensorfile.py
LAYER_3 := topology.py traffic.py denominators.py hypotheses.py wrong_denominator.py experiment.py \
	subject_experiment.py cuts.py fit.py sums.py company.py verdict.py settled.py view.py diagnose.py detectors/* \
	shared.py precision.py decide.py describe.py doubts.py series.py timelines.py scripts/* deadline.py

comma := ,
empty :=
modules = $(subst $(empty) ,$(comma),$(1:%=equivcheck/%))

starts: $(STAMP)
	$(BIN)/python -m pytest tests/ranks/test_starts.py tests/ranks/test_launched.py -m "slow or not slow" -s
	$(BIN)/python -W ignore tests/bench/sharded.py

traffic: $(STAMP)
	@$(BIN)/python -W ignore tests/bench/traffic.py reports/traffic.json reports/traffic.md

# Of the ranks' matrix two points are enough. Watched line by line, and beside each other, tests take longer.
COVER := $(BIN)/python -m pytest -q -n 2 --dist worksteal --timeout 1200 --cov --cov-append --cov-report=

coverage: $(STAMP)
	$(BIN)/python -m coverage erase
	$(COVER) tests/unit tests/cli tests/detection tests/ranks
	$(COVER) tests/ranks/test_engine.py tests/ranks/test_matrix.py -m "slow or not slow" \
		-k "test_engine or R2-K2-even or R2-K4-uneven"
	$(COVER) tests/scripts -m "slow or not slow"
	@set -f; $(BIN)/python -m coverage report -m --include='$(call modules,$(LAYERS_0_1))' --fail-under=100
	@set -f; $(BIN)/python -m coverage report -m --include='$(call modules,$(LAYER_3))' --fail-under=99

claims: $(STAMP)
	$(BIN)/python tests/bench/claims.py
	$(BIN)/python -W ignore tests/bench/claims_ranks.py

examples: $(STAMP)
	$(BIN)/python -W ignore tests/examples.py

examples-check: $(STAMP)
	$(BIN)/python -W ignore tests/examples.py --check

pictures: $(STAMP)
	$(BIN)/python tests/report/pictures.py

readme: $(STAMP)
	$(BIN)/python -m equivcheck.causes README.md
	$(BIN)/python tests/readme_blocks.py README.md

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,lint]'
	touch $@

# One environment per family of frameworks. Each sees torch, and what the tests need, through a path to the main
# environment, so that it holds the framework alone: 40 to 700 MB instead of 1.6 GB.
FRAMEWORKS := transformers lightning deepspeed jax keras
ENVS       ?= .venvs

envs: $(FRAMEWORKS:%=env-%)

env-%: $(ENVS)/%/installed ;

.PRECIOUS: $(ENVS)/%/installed
$(ENVS)/%/installed: $(STAMP)
	test -x $(@D)/bin/python || $(BIN)/python -m venv --without-pip $(@D)
	@cd $(@D)/lib/python3*/site-packages && $(abspath $(BIN))/python -c \
		'import sysconfig; print(sysconfig.get_path("purelib"))' > shared.pth
	$(BIN)/python -m pip --python $(@D)/bin/python install --quiet --constraint constraints.txt \
		--editable '.[$*]'
	touch $@

# A family whose environment cannot be made is named, and fails the target; the others still run.
test-frameworks: $(STAMP)
	@failed=; for family in $(FRAMEWORKS); do \
		echo "== $$family"; \
		$(MAKE) --no-print-directory env-$$family && \
		$(ENVS)/$$family/bin/python -m pytest tests/frameworks tests/scripts -m $$family -q -p no:cacheprovider || failed="$$failed $$family"; \
	done; \
	test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

# What each framework's release does, claim by claim, and every head of Transformers that can be built tiny.
conformance: $(STAMP) envs
	$(BIN)/python tests/conformance/table.py --envs $(ENVS)

conformance-heads: $(STAMP) env-transformers
	$(ENVS)/transformers/bin/python tests/conformance/heads.py reports/latest/heads.jsonl
