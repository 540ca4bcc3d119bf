"""Pure decoding rules: tensors and numbers in, small values out; no model inside."""
