"""Every private name of Ray, vLLM and DeepSpeed that this project uses, each with its cause."""
