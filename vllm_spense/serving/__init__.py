"""The vLLM plugin. Nothing here imports vLLM until vLLM itself asks for the plugin."""
