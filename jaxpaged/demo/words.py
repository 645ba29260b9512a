"""The closed word lists of the demo corpus, and its facts about paging.

Knows only words. Refuses to know sentences that need a choice: those are made in `stories` and `skills`.
"""

GIRLS = (
    "Mia", "Zoë", "Anna", "Aiko", "Lena", "Ruth", "Sara", "Ines", "Nora", "Priya", "Maya", "Clara", "Jule", "Frida",
    "Amara", "Lucía", "Elif", "Hana", "Ida", "Tessa",
)  # fmt: skip
BOYS = (
    "Dan", "Björn", "Tom", "Ben", "Omar", "José", "Max", "Kofi", "Leo", "Jürgen", "Ravi", "Sam", "Emil", "Ken", "Paul",
    "Søren", "Noah", "Ali", "Finn", "Hugo",
)  # fmt: skip
NAMES = GIRLS + BOYS

COLORS = ("red", "blue", "green", "yellow", "white", "black", "brown", "pink", "purple", "orange", "grey", "golden")
OBJECTS = (
    "ball", "kite", "book", "hat", "cup", "boat", "drum", "box", "lamp", "key", "stone", "map", "bell", "bag", "scarf", "clock",
    "pencil", "coat", "basket", "ring", "spoon", "blanket", "flute", "mirror",
)  # fmt: skip
ANIMALS = (
    "cat", "dog", "fox", "frog", "duck", "horse", "hen", "rabbit", "mouse", "turtle", "bird", "goat", "sheep", "bear", "fish",
    "hedgehog", "squirrel", "pony", "snail", "crab",
)  # fmt: skip
PLACES = (
    "garden", "park", "forest", "beach", "market", "library", "school", "farm", "river", "hill", "kitchen", "lake", "station",
    "museum", "bridge", "village", "harbour", "meadow",
)  # fmt: skip
FOODS = ("apple", "pear", "cake", "sandwich", "bun", "plum", "cookie", "carrot", "banana", "pie", "muffin", "pancake")
COUNTED = (
    "apples",
    "pears",
    "plums",
    "cookies",
    "carrots",
    "eggs",
    "stones",
    "books",
    "balls",
    "keys",
    "stars",
    "shells",
    "pencils",
)
SIZES = ("small", "big", "tiny", "round", "old", "new", "shiny", "heavy")
FEELINGS = ("happy", "proud", "calm", "glad", "thankful", "cheerful")
WORRIES = ("sad", "worried", "tired", "lonely", "nervous", "hungry")
JOBS = ("baker", "teacher", "doctor", "farmer", "pilot", "painter", "sailor", "gardener", "singer", "cook")
WEATHER = (
    ("sunny", "put on a hat"),
    ("rainy", "took an umbrella"),
    ("windy", "held on to the scarf"),
    ("cold", "put on a warm coat"),
    ("warm", "drank a cup of water"),
    ("foggy", "walked slowly"),
    ("snowy", "put on thick boots"),
    ("cloudy", "looked up at the sky"),
)

CAPITALS = (
    ("France", "Paris"), ("Germany", "Berlin"), ("Italy", "Rome"), ("Spain", "Madrid"), ("Norway", "Oslo"), ("Japan", "Tokyo"),
    ("China", "Beijing"), ("India", "New Delhi"), ("Egypt", "Cairo"), ("Kenya", "Nairobi"), ("Peru", "Lima"), ("Cuba", "Havana"),
    ("Poland", "Warsaw"), ("Austria", "Vienna"), ("Greece", "Athens"), ("Portugal", "Lisbon"), ("Sweden", "Stockholm"),
    ("Finland", "Helsinki"), ("Denmark", "Copenhagen"), ("Ireland", "Dublin"), ("Canada", "Ottawa"), ("Chile", "Santiago"),
    ("Ghana", "Accra"), ("Mexico", "Mexico City"), ("Turkey", "Ankara"), ("Hungary", "Budapest"), ("Switzerland", "Bern"),
    ("Thailand", "Bangkok"), ("Vietnam", "Hanoi"), ("Iceland", "Reykjavík"), ("England", "London"), ("Brazil", "Brasília"),
)  # fmt: skip
CITIES = (
    "Paris", "Berlin", "Rome", "Madrid", "Oslo", "Tokyo", "Beijing", "Cairo", "Nairobi", "Lima", "Warsaw", "Vienna", "Athens",
    "Lisbon", "Dublin", "London", "Zürich", "München", "Köln", "Malmö",
)  # fmt: skip

# English word: emoji, German, Spanish, Japanese, Chinese. Two- to four-byte characters, so that a token may end inside one.
WORDS = {
    "cat": ("🐱", "Katze", "gato", "猫", "猫"),
    "dog": ("🐶", "Hund", "perro", "犬", "狗"),
    "fox": ("🦊", "Fuchs", "zorro", "狐", "狐狸"),
    "frog": ("🐸", "Frosch", "rana", "蛙", "青蛙"),
    "fish": ("🐟", "Fisch", "pez", "魚", "鱼"),
    "bear": ("🐻", "Bär", "oso", "熊", "熊"),
    "bird": ("🐦", "Vogel", "pájaro", "鳥", "鸟"),
    "horse": ("🐴", "Pferd", "caballo", "馬", "马"),
    "mouse": ("🐭", "Maus", "ratón", "鼠", "老鼠"),
    "turtle": ("🐢", "Schildkröte", "tortuga", "亀", "乌龟"),
    "apple": ("🍎", "Apfel", "manzana", "りんご", "苹果"),
    "cake": ("🍰", "Kuchen", "pastel", "ケーキ", "蛋糕"),
    "bread": ("🍞", "Brot", "pan", "パン", "面包"),
    "cheese": ("🧀", "Käse", "queso", "チーズ", "奶酪"),
    "egg": ("🥚", "Ei", "huevo", "卵", "鸡蛋"),
    "lemon": ("🍋", "Zitrone", "limón", "レモン", "柠檬"),
    "sun": ("🌞", "Sonne", "sol", "太陽", "太阳"),
    "moon": ("🌙", "Mond", "luna", "月", "月亮"),
    "star": ("⭐", "Stern", "estrella", "星", "星星"),
    "rain": ("🌧", "Regen", "lluvia", "雨", "雨"),
    "snow": ("⛄", "Schnee", "nieve", "雪", "雪"),
    "tree": ("🌳", "Baum", "árbol", "木", "树"),
    "flower": ("🌸", "Blume", "flor", "花", "花"),
    "house": ("🏠", "Haus", "casa", "家", "房子"),
    "book": ("📖", "Buch", "libro", "本", "书"),
    "key": ("🔑", "Schlüssel", "llave", "鍵", "钥匙"),
    "ball": ("⚽", "Ball", "pelota", "ボール", "球"),
    "boat": ("⛵", "Boot", "barco", "舟", "船"),
    "door": ("🚪", "Tür", "puerta", "扉", "门"),
    "heart": ("💙", "Herz", "corazón", "心", "心"),
    "fire": ("🔥", "Feuer", "fuego", "火", "火"),
    "water": ("💧", "Wasser", "agua", "水", "水"),
}
LANGUAGES = ("emoji", "German", "Spanish", "Japanese", "Chinese")

# (questions, answer). Every answer is a whole statement, so that it also stands alone as plain text.
FACTS = (
    (("What is jaxpaged?", "Tell me about jaxpaged.", "Explain jaxpaged."),
     "jaxpaged is a PagedAttention inference engine written in JAX, with its own library of Pallas kernels."),
    (("What is PagedAttention?", "Explain PagedAttention.", "What is paged attention?"),
     "PagedAttention stores the keys and values of a sequence in pages, so that memory is used only where tokens are."),
    (("What is a page?", "Explain pages.", "What does page mean?"),
     "A page is a fixed number of consecutive token places of the KV cache."),
    (("What is a block table?", "Explain the block table.", "What does a block table do?"),
     "A block table lists the pages of one sequence, in order."),
    (("What is a slot?", "Explain slots."),
     "A slot is the place of one token in the cache: the page times the page size, plus the offset."),
    (("What is the null page?", "Explain the null page.", "What is page 0?"),
     "The null page is page 0, the target of all padding."),
    (("What is a KV cache?", "What is the KV cache?", "Explain the KV cache."),
     "The KV cache holds the keys and values of all past tokens, so that they are not computed again."),
    (("What is prefill?", "Explain prefill."),
     "Prefill reads the whole prompt and fills the cache with its keys and values."),
    (("What is decoding?", "What is decode?", "Explain decode."),
     "Decode makes one new token for each running sequence."),
    (("What is prefix caching?", "Explain prefix caching.", "What does prefix caching do?"),
     "Prefix caching lets two requests that start with the same tokens share the same pages."),
    (("What is preemption?", "Explain preemption."),
     "Preemption takes the pages of one sequence away when memory runs out, and computes them again later."),
    (("What is continuous batching?", "Explain continuous batching."),
     "Continuous batching lets a new request join at any step, without waiting for the others to end."),
    (("What is chunked prefill?", "Explain chunked prefill."),
     "Chunked prefill cuts a long prompt into pieces, so that other sequences do not wait for it."),
    (("What is speculative decoding?", "Explain speculative decoding."),
     "Speculative decoding lets a small draft model guess the next tokens, and the big model checks them in one step."),
    (("What is a draft model?", "Explain the draft model."),
     "A draft model is a small model that guesses tokens for a bigger one."),
    (("What is JAX?", "Explain JAX."),
     "JAX is a Python library for fast array programs on CPUs, GPUs and TPUs."),
    (("What is Pallas?", "Explain Pallas."),
     "Pallas is the part of JAX in which you write your own kernels."),
    (("What is a kernel?", "Explain kernels."),
     "A kernel is a small program that runs on the accelerator."),
    (("What is a token?", "Explain tokens."),
     "A token is a piece of text, often a word or a part of a word, that the model reads as one number."),
    (("What is a tokenizer?", "Explain the tokenizer."),
     "A tokenizer turns text into tokens, and tokens back into text."),
    (("What is greedy decoding?", "Explain greedy decoding."),
     "Greedy decoding always takes the most likely next token."),
    (("What is temperature?", "Explain temperature.", "What does temperature do?"),
     "Temperature divides the scores before sampling: a low one is careful, a high one is wild, and zero is greedy."),
    (("What is top-p sampling?", "What is top-p?", "Explain top-p."),
     "Top-p keeps the smallest set of tokens whose chances add up to p."),
    (("What is top-k sampling?", "What is top-k?", "Explain top-k."),
     "Top-k keeps only the k most likely tokens."),
    (("What is a stop string?", "Explain stop strings."),
     "A stop string ends the answer as soon as it appears in the text."),
    (("What is streaming?", "Explain streaming."),
     "Streaming sends each piece of the answer as soon as it is made."),
    (("What is grouped-query attention?", "What is GQA?", "Explain GQA."),
     "Grouped-query attention lets several query heads share one key and value head, which makes the cache smaller."),
    (("What is attention?", "Explain attention."),
     "Attention lets each token look at the tokens before it and take what it needs."),
    (("What is RoPE?", "What is rotary embedding?", "Explain RoPE."),
     "RoPE turns queries and keys by an angle that grows with the position, so that the model knows how far apart tokens are."),
    (("What is a softmax?", "What is softmax?", "Explain softmax."),
     "Softmax turns scores into chances that add up to one."),
    (("What is bfloat16?", "Explain bfloat16."),
     "bfloat16 is a number of two bytes with the range of float32 and less precision."),
    (("What does the scheduler do?", "What is the scheduler?", "Explain the scheduler."),
     "The scheduler plans which sequences run in the next step and which pages they get."),
    (("What is a bucket?", "Explain buckets."),
     "A bucket is a shape that is compiled ahead of time."),
    (("What are the four verbs of a step?", "What happens in a step?"),
     "The four verbs of a step are plan, pad, step and commit."),
    (("What is a language model?", "Explain language models."),
     "A language model guesses the next token from the tokens before it."),
    (("What is a logprob?", "Explain logprobs."),
     "A logprob is the logarithm of the chance of a token."),
    (("What is a system prompt?", "Explain the system prompt."),
     "A system prompt is the first message of a chat and tells the model how to behave."),
    (("What is a chat template?", "Explain the chat template."),
     "A chat template turns a list of messages into one text."),
    (("What is a tool call?", "Explain tool calls."),
     "A tool call asks the program around the model to run a function and to return its result."),
    (("What is JSON?", "Explain JSON."),
     "JSON is a text format for objects, lists, strings and numbers."),
    (("What is latency?", "Explain latency."),
     "Latency is the time that one request waits for its answer."),
    (("What is throughput?", "Explain throughput."),
     "Throughput is the number of tokens made per second, over all requests."),
    (("What is a GPU?", "Explain GPUs."),
     "A GPU is a chip that does many small computations at the same time."),
    (("What is a TPU?", "Explain TPUs."),
     "A TPU is a chip made for large matrix products."),
    (("Why are pages useful?", "Why do we use pages?", "Why is the cache paged?"),
     "Pages are useful because a sequence can grow without moving, and no memory is kept for tokens that never come."),
    (("Who are you?", "What are you?", "Introduce yourself."),
     "I am the demo model of jaxpaged, a very small language model."),
    (("What can you do?", "How can you help me?", "What are you good at?"),
     "I can tell short stories, repeat text, sort lists, add numbers, read a text, write JSON and call tools."),
    (("What can you not do?", "What are your limits?"),
     "I know very little about the world, so please do not ask me for advice."),
    (("How big are you?", "How many parameters do you have?"),
     "I have fewer than two million parameters, so I am tiny."),
    (("How were you trained?", "Who made you?"),
     "I was trained on the CPU with JAX and optax, on text that the jaxpaged project wrote itself."),
)  # fmt: skip

SMALL_TALK = (
    (("Hi!", "Hello!", "Hey!", "Hi", "Hello", "Hello there!"), "Hello! How can I help you?"),
    (("How are you?", "How are you today?", "How do you do?"), "I am fine, thank you. How can I help you?"),
    (("Thank you!", "Thanks!", "Thanks a lot!"), "You are welcome!"),
    (("Bye!", "Goodbye!", "See you!"), "Goodbye! Have a nice day."),
    (("Good morning!", "Good morning"), "Good morning! What can I do for you?"),
    (("Good night!", "Good night"), "Good night! Sleep well."),
)

# Beginnings that people type first when they try an engine, with a harmless end.
OPENERS = (
    "The future of AI is open, and nobody knows it yet.",
    "The president of the United States is a person whom the people choose every four years.",
    "The quick brown fox jumps over the lazy dog.",
    "The meaning of life is a hard question, and I am only a small model.",
    "The best way to learn is to try, to fail and to try again.",
    "The sky is blue, the grass is green and the snow is white.",
    "Once upon a time, there was a very small model that lived on a very small computer.",
    "The answer to everything is 42.",
)
