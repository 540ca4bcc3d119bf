"""Pure decoding rules: tensors and an explicit generator in, small values out; no model inside."""
