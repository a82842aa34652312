"""Cases of IF-Train's types, for label.py. The official code: allenai/open-instruct, open_instruct/IFEvalG."""
