"""These tools operate the project: captions by language models, downloads, sweeps, exports, benchmarks, bundling.

Tools import the package above them and are never imported by it. `taco-nb --help` lists what they do.
"""
