"""The CUDA backend: kernels in `kernels/`, launched through a Device."""
