"""The FLANv2-48 setting: 48 public LoRA adapters of Llama-2-7B and their evaluation rows, as datasets and adapters of Meteora."""
