# Two commands do everything: `make quickstart` and `make test`. `make install` does neither.
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev
BIN = $(VENV)/bin

.PHONY: install quickstart test quick lint

install: $(VENV)/installed

quickstart: $(VENV)/installed
	PYTHON=$(BIN)/python launch/local.sh train.py experiment=quickstart
	$(BIN)/python evaluate.py model.path=outputs/quickstart/hf trainer.output_dir=outputs/quickstart sampling.batch_size=256
	@echo 'An answer forms: sample.py model.path=outputs/quickstart/hf prompt="Solve 3x+5=20"'
	@$(BIN)/python sample.py model.path=outputs/quickstart/hf prompt="Solve 3x+5=20"
	@echo 'Next, in the environment ($(BIN)/activate):'
	@echo '  python sample.py model.path=outputs/quickstart/hf mode=chat  # one question a chat: /reset before the next'
	@echo '  python -m launch.compare_sampling model.path=outputs/quickstart/hf sampling.alg=entropy,origin sampling.steps=3,6,18'
	@echo '  python -m launch.verify experiment=lora model=dream_7b_instruct data.train_files=mine.jsonl  # your rows'

test: $(VENV)/installed
	$(BIN)/python -m pytest -m "not slow" -n auto --maxprocesses 8 --dist worksteal

quick: $(VENV)/installed
	$(BIN)/python -m pytest -m "not slow" -n auto --maxprocesses 8 --dist worksteal tests/sampling tests/diffllm

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@
