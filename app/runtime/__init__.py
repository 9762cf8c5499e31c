"""The one place that knows onnxruntime."""
