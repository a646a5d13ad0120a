"""The processes of a mount: what they are started with, and what they give up."""
