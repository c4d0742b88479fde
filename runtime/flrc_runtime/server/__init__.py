"""An HTTP server for a bundle that speaks OpenAI's protocol; needs the extra ``serve``."""
