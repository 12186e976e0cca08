"""Prompt encoding: the prompt tokenizer, and the frozen LLM and T5 encoders."""
