"""Detection method, from a volume to findings.

The package uses numpy, scipy and nibabel only. Its networks are callables on arrays (`app.pipeline.diffusion`).
"""
