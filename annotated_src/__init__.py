"""Decoder language models, written to be read.

Read the files in this order; each imports only from files above it.

    embedding      token ids to vectors
    activations    gelu, silu
    norms          LayerNorm, RMSNorm
    rotary         positions to rotations of queries and keys
    positions      the number each token gets
    masks          which tokens a token may look at
    kv_cache       keys and values of the tokens already seen
    feed_forward   FeedForward, GatedFeedForward
    attention      repeat_kv, attend, Attention
    models.llama   LlamaConfig, LlamaBlock, Llama, HF_NAMES
    gguf           read a GGUF file
    checkpoint     read, rename and load weights, strictly
    tokenizer      text to ids and back; chat templates
    gguf_to_hf     a GGUF file as a Hugging Face directory
    weights        fetch the real model
    sampling       choose the next token
    generate       prefill, then decode
    show           show source in a notebook
    figures        the pictures of the book, and the numbers behind them

Shape letters, the same in every file:

    B  batch                    N  query heads           D  model width (embed_dim)
    T  tokens in this call      K  key/value heads       F  feed-forward width (ffn_dim)
    S  tokens attended to       H  width of one head     V  vocabulary size
"""
