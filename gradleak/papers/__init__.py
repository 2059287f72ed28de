"""The paper experiments: measuring, storing, and setting published numbers beside ours."""
