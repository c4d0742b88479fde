"""Turn a checkpoint into a bundle: one ONNX graph per stage, one weight file."""
