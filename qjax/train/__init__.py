"""Fine-tuning: adapters over packed weights, and quantization-aware training."""
