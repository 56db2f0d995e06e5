# `make help` says what there is. Whatever is missing is fetched into target/ first, once.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: help setup build demo test test-nccl sim soak soak-train gpu bench-train bench-gpu bench-fetch bench-import bench-scale fuzz engine images dist try-cluster libtorch pytorch clean

tools := target/tools
export PATH := $(CURDIR)/$(tools)/bin:$(PATH)
python := $(tools)/venv/bin/python
comma := ,

help:
	@echo "make demo [ARGS=...]      a rotted URL list goes in, a trained AlexNet comes out; all on this machine"
	@echo "make build                the gleaner binary: target/debug/gleaner"
	@echo "make test                 everything that has to hold, with the time of each stage"
	@echo "make test-nccl            does the NCCL backend compile, link and start? (part of 'make test' when CI is set)"
	@echo "make sim                  a cluster in one thread, with simulated store, clocks and network, of which everything goes wrong that a"
	@echo "                          seed says: nothing may be lost, doubled or asked too often [SEED=1 SEEDS=100; SIZE=large: 1,000 workers,"
	@echo "                          100,000,000 URLs; TRACE=1: all that happens]"
	@echo "make soak                 a cluster of which something is killed, stopped, cut off or confused every second, for MINUTES=5; each URL"
	@echo "                          must have its outcome in the end, and fsck finds nothing [SEED=1]"
	@echo "make soak-train           a run whose ranks and agents are killed every 10 s for SECONDS=300; its ledger must be an undisturbed one's"
	@echo "make bench-train          the trainer against PyTorch, torchvision and WebDataset on this machine [ARGS=--help]"
	@echo "make bench-gpu            the trainer on a GPU against PyTorch, eager and compiled, on the same one; ARGS=\"--devices cpu\": on the CPU"
	@echo "                          [CUDA=1: built with 'make libtorch CUDA=1'; PYTHON=python3: one whose torch sees the GPU]"
	@echo "make bench-fetch          Gleaner and img2dataset on the same lists (PHOTOS=photos.tar: with these JPEGs; ROUNDS=2)"
	@echo "make bench-import         Gleaner, img2dataset and Hugging Face's datasets on 10,000 pictures that are there already: a folder, tars,"
	@echo "                          Parquet (PHOTOS=photos.tar: of these JPEGs; ROUNDS=2)"
	@echo "make bench-scale          1, 2 and 4 workers against a slow web, and a site's budget that they keep together"
	@echo "make fuzz                 feeds garbage to what reads lists, images, shards, imports and who comes in, each for SECONDS=60"
	@echo "make setup                libtorch and the build's tools, into target/; every other target does it first"
	@echo "make images               both container images, as archives in target/images; needs buildah. PROFILE=dev: quicker, if"
	@echo "                          tests were run; IMAGES=gleaner: the small one alone"
	@echo "make dist                 the small binary for any Linux of the last ten years, as archives and Python wheels in target/dist"
	@echo "                          [ARCHS=x86_64: without the one for aarch64]"
	@echo "make try-cluster          the pods of overlays/local-urls, through kills and replacements, on the cluster that kubectl talks to, in"
	@echo "                          namespaces that it makes and removes; needs the images of 'make images' on its node. ARGS=--help"
	@echo "make libtorch CUDA=1      libtorch with CUDA and NCCL, into target/libtorch-cuda; to build with it:"
	@echo "                          LIBTORCH=\$$PWD/target/libtorch-cuda cargo build --release --features nccl"
	@echo "make gpu                  a binary with NCCL, target/gpu/gleaner, to be carried to a machine with a GPU; no GPU is needed to build it"
	@echo "                          [TORCH=2.11.0: for the libtorch of that torch; PROFILE=dev: sooner]"
	@echo "make pytorch              Python's torch, webdataset and a SeaweedFS, which tests compare with and store in"
	@echo "make engine               the code by which a page in a browser runs a trained network, after its sources were changed"
	@echo "make clean                removes what cargo built; 'rm -r target' removes the rest too"

setup: $(tools)/ready target/libtorch/build-version

build: setup
	cargo build --locked -p gleaner

demo: setup
	cargo run --locked -p gleaner -- demo $(ARGS)

test: setup pytorch
	deploy/setup/test.sh

test-nccl: setup
	deploy/setup/nccl.sh

gpu: setup
	TORCH=$(TORCH) PROFILE=$(PROFILE) deploy/setup/gpu.sh

images: setup
	deploy/images.sh $(IMAGES)

try-cluster: $(tools)/ready
	$(python) tests/k8s/cluster.py $(ARGS)

sim: $(tools)/ready
	SEED=$(or $(SEED),1) SEEDS=$(or $(SEEDS),1) \
	    cargo test --locked --config 'profile.dev.package.gleaner-coordinator.opt-level=2' -p gleaner-coordinator --lib -- --ignored --exact --nocapture sim::$(or $(SIZE),small)

soak: $(tools)/ready
	SEED=$(or $(SEED),1) MINUTES=$(or $(MINUTES),5) cargo test --locked -p gleaner --test soak -- --ignored --exact --nocapture soak | tee target/soak.log
	@grep '^soak:' target/soak.log

soak-train: setup
	SECONDS_OF_KILLS=$(or $(SECONDS),300) cargo test --locked -p gleaner --test elastic -- --ignored --exact --nocapture soak | tee target/soak-train.log
	@grep '^soak-train:' target/soak-train.log

bench-train: setup pytorch $(tools)/torchvision/ready
	cargo build --locked --release -p gleaner-trainer --features bench --example bench
	PYTHONPATH=$(tools)/torchvision $(tools)/pytorch/bin/python tests/bench/train/train.py --bench target/release/examples/bench $(ARGS)

# PYTHON brings its own torchvision and webdataset, or goes without.
bench-gpu: setup pytorch $(tools)/torchvision/ready
	$(if $(CUDA),LIBTORCH=$(CURDIR)/target/libtorch-cuda )cargo build --locked --release -p gleaner-trainer --features bench$(if $(CUDA),$(comma)nccl) --example bench
	$(if $(PYTHON),$(PYTHON),PYTHONPATH=$(tools)/torchvision $(tools)/pytorch/bin/python) tests/bench/train/gpu.py --bench target/release/examples/bench $(ARGS)

# The build of `make images`, as fetch workers are deployed.
bench-fetch: $(tools)/ready $(tools)/img2dataset/ready
	PHOTOS="$(PHOTOS)" cargo bench --locked -p gleaner --bench fetch --no-default-features --features demo -- \
	    --rival $(CURDIR)/$(tools)/img2dataset/bin/python $(ARGS)

bench-import: $(tools)/ready pytorch $(tools)/img2dataset/ready
	PHOTOS="$(PHOTOS)" cargo bench --locked -p gleaner --bench bench-import --no-default-features --features demo -- \
	    --datasets $(CURDIR)/$(tools)/pytorch/bin/python --img2dataset $(CURDIR)/$(tools)/img2dataset/bin/python $(ARGS)

bench-scale: $(tools)/ready
	cargo bench --locked -p gleaner --bench scale --no-default-features --features demo

dist: $(tools)/ready
	deploy/setup/dist.sh $(ARCHS)

engine:
	deploy/setup/engine.sh

fuzz: $(tools)/ready
	deploy/setup/fuzz.sh $(or $(SECONDS),60)

# CUDA=1: with CUDA. LINK_ONLY=1 besides: without NVIDIA's libraries, for machines that have no GPU.
libtorch: setup $(if $(CUDA),target/libtorch-cuda/$(if $(LINK_ONLY),link,full))

pytorch: $(tools)/pytorch/ready

clean:
	cargo clean --profile dev
	cargo clean --profile release

$(tools)/ready: deploy/setup/tools.sh deploy/setup/tools.txt
	deploy/setup/tools.sh
	touch $@

target/libtorch/build-version: deploy/setup/libtorch.py deploy/setup/libtorch.txt | $(tools)/ready
	$(python) deploy/setup/libtorch.py cpu

target/libtorch-cuda/full: deploy/setup/libtorch.py deploy/setup/cuda.txt target/libtorch/build-version
	$(python) deploy/setup/libtorch.py cuda
	touch $@

target/libtorch-cuda/link: deploy/setup/libtorch.py deploy/setup/cuda.txt target/libtorch/build-version
	$(python) deploy/setup/libtorch.py cuda-link
	touch $@

$(tools)/pytorch/ready: deploy/setup/python.txt target/libtorch/build-version
	rm -rf $(@D)
	deploy/setup/venv.sh $(@D)
	$(@D)/bin/python deploy/setup/libtorch.py python
	touch $@

$(tools)/torchvision/ready: tests/bench/train/python.txt $(tools)/pytorch/ready
	rm -rf $(@D)
	$(tools)/pytorch/bin/python -m pip --disable-pip-version-check install --quiet --require-hashes --no-deps --target $(@D) -r $<
	touch $@

$(tools)/img2dataset/ready: deploy/setup/img2dataset.txt $(tools)/ready
	rm -rf $(@D)
	deploy/setup/venv.sh $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check install --quiet --require-hashes --no-deps --only-binary=:all: -r $<
	touch $@
