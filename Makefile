.PHONY: measure-gpu check test test-all test-matrix test-faults format

check:            ## lint and types
	ruff check .
	ruff format --check .
	mypy

test:             ## the fast tests
	pytest -n 2 --dist loadfile

test-all:         ## slow and fault tests too, as CI runs them
	pytest -n 2 --dist loadfile -m "not gpu and not matrix"

test-matrix:      ## all tests and cases, of which CI runs a part (hours)
	pytest -n 2 --dist loadfile -m "(matrix and not fault) or not (slow or fault or gpu)"

test-faults:      ## a hundred kills of workers, launchers and databases, over each launcher (half an hour)
	pytest -m "fault and matrix"

format:
	ruff check --fix .
	ruff format .

measure-gpu:           ## everything that is told of a GPU: tests, tables, a study (an hour and a half on an H100)
	pytest -m gpu
	python benchmarks/gpu.py --sides ours,trl,best --length short,long
	python benchmarks/gpu.py --sides ours,trl,best --memory 24
	python benchmarks/gpu.py --sides ours --slots 1 --lora q_v --quantization nf4_double  # as Unsloth's
	python benchmarks/gpu.py --sides ours --slots 1,8,16 --lora all_linear --checkpointing off --length turns,short --busy \
		--shapes smollm2_135m,qwen3_0_6b,llama3_2_1b,llama3_2_3b
	python benchmarks/gpu.py --slots 1,8 --lora all_linear --checkpointing off --shapes gemma3_4b,phi4_mini,qwen3_5_4b
	python benchmarks/gpu.py --sides ours --slots 1,4,8 --lora all_linear --checkpointing on --memory 24 --shapes qwen3_30b_a3b
	python benchmarks/gpu.py --sides ours --slots 1,4,8 --gpus 2 --lora q_v --quantization nf4_double --checkpointing on --shapes llama3_3_70b  # two GPUs
	python benchmarks/gpu.py --sides ours --slots 4,8 --gpus 2 --turns --lora q_v --quantization nf4_double --checkpointing on --shapes llama3_3_70b  # in turns
	python benchmarks/gpu.py --sides ours --slots 1,2 --gpus 2 --memory 24 --lora q_v --quantization nf4_double --checkpointing on --shapes llama3_3_70b
	python benchmarks/gpu.py --sides ours --slots 8,16 --gpus 4 --lora q_v --quantization nf4_double --checkpointing on --shapes llama3_3_70b  # four
	python benchmarks/gpu_study.py --rungs 0.25,0.5,0.75 --sides tutorial,best,ours,recipe
	python benchmarks/gpu_study.py --sides ours --memory 24
	python benchmarks/gpu.py --sides unsloth --length short  # last, where Unsloth is installed
