"""Decoder language models, written to be read.

Read the files in this order; each imports only from files above it.

    embedding      token ids to vectors
    activations    gelu, silu
    norms          LayerNorm, RMSNorm
    rotary         positions to rotations of queries and keys
    rotary_2d      two positions a token: each turns half of a head
    positions      the number, or the two numbers, that each token gets
    masks          which tokens a token may look at
    kv_cache       keys and values of the tokens already seen
    answer_cache   the same for ChatGLM, and where its answer stands
    placement      where a call's tokens stand, and what they see
    feed_forward   FeedForward, GatedFeedForward
    attention      repeat_kv, attend, Attention
    attention_by_layer  FusedAttention, in an order that float16 can hold
    prefix_tuning  PrefixEncoder: P-tuning v2
    quantize       int8 and int4 weights, for any model
    chatglm_quantize  ChatGLM's own
    hf_sizes       a model's sizes, in the words of config.json
    models.llama   LlamaConfig, LlamaBlock, Llama, HF_NAMES
    models.gemma   GemmaConfig, GemmaBlock, Gemma, HF_NAMES
    models.phi     PhiConfig, PhiBlock, Phi, HF_NAMES
    models.chatglm  ChatGLMConfig, ChatGLMBlock, ChatGLM, HF_NAMES
    fast           Llama for speed: int8 products
    loss           what training makes small
    blank_infilling  plain text to training examples
    gguf           read a GGUF file
    shards         the files of a checkpoint
    fused_qkv      queries, keys and values in one matrix: apart, and together
    tensor_names   a tensor's name in the files and in the model
    config_json    check what config.json says
    hf_config      write config.json
    originals      names and sizes in files from before Hugging Face's
    architectures  from config.json to a model without weights
    saving         write a checkpoint
    checkpoint     read, rename and load weights, strictly
    chatglm_text   ChatGLM's whitespace, prompts and clean-up
    chatglm_tokenizer  ChatGLM's ids: blanks, padding with masks and positions
    byte_alphabet  bytes as characters that one can see
    byte_pair      BytePairEncoder: text to ids, spelled out
    learn_merges   where its merges come from
    chat_template  conversations to text
    tokenizer      text to ids and back
    gguf_to_hf     a GGUF file as a Hugging Face directory
    weights        fetch the real model
    small_chatglm  the small ChatGLM that comes along
    training_text  the text that it learnt from
    train_small_chatglm  how it was trained
    training       teach a small Llama a text
    sampling       filters of the next token's scores
    sampler        choose the next token
    generate       prefill, then decode
    scoring        how well a model expects a text
    grading        how far two models' scores are apart
    pipeline       preprocess, forward, postprocess
    command_line   answer in the terminal
    beam_search    several continuations at once
    quiet          keep a talkative library quiet
    tflite_file    open a .tflite file, and look in
    edge           run an exported model, without torch
    edge_model     a decoder with fixed shapes; the cache goes in and comes out
    convert        to one .tflite file, and to fewer bits
    export         a model for a device: prefill and decode in one file
    golden         what the original ChatGLM-6B computed
    show           show source in a notebook
    checks         what lets an exercise answer
    exercises      the exercises of every chapter, their solutions and their mistakes
    classroom      hand them to a class, and mark them
    figures        the pictures of the book, and the numbers behind them

Shape letters, the same in every file:

    B  batch                    N  query heads           D  model width (embed_dim)
    T  tokens in this call      K  key/value heads       F  feed-forward width (ffn_dim)
    S  tokens attended to       H  width of one head     V  vocabulary size
"""
